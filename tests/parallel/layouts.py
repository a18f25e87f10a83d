"""The layout matrix: which cells there are, a subset that has every pair of settings, and one cell on this world."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

import torch
from tiny_run import Outcome, build_engine, data_of, follow, learning_rate, merged, passes_of, reference, tiny_config

from megavtp.config.schema import Config, VisionConfig
from megavtp.nn import compiling
from megavtp.parallel.collectives import all_gather_object, all_reduce
from megavtp.parallel.mesh import build_mesh
from megavtp.training.step import train_step

MAX_PROCESSES = 8
# Text and decoder are short, so that some chunks are empty. Layer scale keeps a deep stack of random weights from
# magnifying the rounding of its input, and mean patches differ more from image to image than class tokens do: gradients
# that are differences of nearly equal features would be mostly rounding.
MODEL = {
    "init_logit_scale": 2.3, "vision": {"depth": 4, "layer_scale": 0.3, "clip_feature": "pooled"},
    "text": {"depth": 2, "layer_scale": 0.3}, "decoder": {"depth": 3, "layer_scale": 0.3},
}
BATCH = 16  # of every objective: 4 data-parallel ranks with 4 micro-batches each
# What the layouts of ``basic_layouts`` change: every term and the default image feature, longer, and less deep.
BASIC = {
    "model": {
        "vision": {"depth": 2, "clip_feature": VisionConfig().clip_feature}, "text": {"depth": 1},
        "decoder": {"depth": 1},
    },
    "train": {"steps": 4}, "objectives": {"reconstruction": {"l1_weight": 1.0}},
}

# The decoder's second stage, in which the discriminator learns from the first step and teaches from the second.
SECOND_STAGE = {
    "model": {"init_from": "not read here", "decoder": {"depth": 4}},
    "objectives": {
        "contrastive": {"weight": 0.0}, "self_distillation": {"weight": 0.0},
        "reconstruction": {"frozen_encoder": True, "decoder_momentum": 0.9},
        # More tokens than the pictures have: the variance of four, by which a head divides, can be nearly nothing.
        "adversarial": {"weight": 0.75, "discriminator_start": 0.0, "start": 0.26, "features_size": 64},
    },
}


@dataclass(frozen=True)
class Cell:
    """One layout. ``off``: the objective that is switched off, "" = none."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    precision: str = "fp32"
    sequence_parallel: bool = False
    micro_batches: int = 1
    off: str = ""
    compile: str = "none"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def virtual_stages(self) -> int:
        return 2 if self.schedule == "interleaved_1f1b" else 1

    @property
    def depth(self) -> int:
        """Of the encoder: every stage needs a block."""
        return max(4, self.pp * self.virtual_stages)

    @property
    def cost(self) -> float:
        """About how long it takes, on gloo and few cores: by the number of collective calls of all processes."""
        calls = (2 if self.tp > 1 else 0) + (2 if self.zero == 3 else 0) + (self.pp > 1) + 1
        return self.world * self.depth * self.micro_batches * calls * (1.5 if self.recompute == "full" else 1)

    def overrides(self) -> dict:
        """What sets the cell apart from the plain run."""
        names = ("contrastive", "self_distillation", "reconstruction")
        objectives: dict[str, dict] = {name: {"micro_batch": BATCH // self.dp // self.micro_batches} for name in names}
        if self.off:
            objectives[self.off] = {"weight": 0.0}
        parallel = {
            "tp": self.tp, "pp": self.pp, "zero_stage": self.zero, "schedule": self.schedule,
            "virtual_stages": self.virtual_stages, "recompute": self.recompute,
            "precision": self.precision, "sequence_parallel": self.sequence_parallel, "compile": self.compile,
        }
        return {"objectives": objectives, "parallel": parallel}

    def config(self, extra: dict | None = None) -> Config:
        return tiny_config(merged(self._settings(extra), self.overrides()), self.world)

    def plain_config(self, extra: dict | None = None) -> Config:
        """The same run on one process."""
        off = {"objectives": {self.off: {"weight": 0.0}}} if self.off else {}
        return tiny_config(merged(self._settings(extra), {"parallel": {"precision": self.precision}, **off}))

    def _settings(self, extra: dict | None) -> dict:
        """What all cells of this depth share."""
        batch, depth = {"batch": BATCH}, {"vision": {"depth": self.depth}}
        base = {
            "model": merged(MODEL, depth), "train": {"steps": 2, "batch_size": BATCH},
            # Without L1 the pictures need not be stark (``tiny_run``).
            "objectives": {
                "self_distillation": batch,
                "reconstruction": {**batch, "l1_weight": 0.0, "perceptual": "lpips-alex", "perceptual_weight": 3.0},
            },
        }
        return merged(base, extra or {})

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"sequence_parallel": "yes" if self.sequence_parallel else "no", "off": self.off or "-"}
        return "  ".join(f"{values[name]!s:<{width}}" for name, width in _WIDTHS.items())


AXES: dict[str, tuple] = {
    "tp": (1, 2, 4), "pp": (1, 2, 4), "dp": (1, 2, 4), "zero": (0, 1, 2, 3),
    "schedule": ("1f1b", "gpipe", "interleaved_1f1b"), "recompute": ("none", "selective", "full"),
    "precision": ("fp32", "bf16"), "sequence_parallel": (False, True), "micro_batches": (1, 2, 4),
    "off": ("", "contrastive", "self_distillation", "reconstruction"), "compile": ("none", "blocks"),
}
_WIDTHS = {name: max(len(name), *(len(str(value)) for value in values)) for name, values in AXES.items()}
HEADER = "  ".join(f"{name:<{width}}" for name, width in _WIDTHS.items())


def legal(cell: Cell) -> bool:
    """Whether the cell is one that a user may ask for. Written out here, and compared with the config's own rules."""
    schedule = cell.pp > 1 or cell.schedule == "1f1b"
    return schedule and (cell.tp > 1 or not cell.sequence_parallel)


def cells(**given: Iterable) -> list[Cell]:
    """Every combination of the settings, legal or not, on up to ``MAX_PROCESSES``; ``given`` narrows an axis."""
    every = (Cell(*values) for values in itertools.product(*({**AXES, **given}.values())))
    return [cell for cell in every if cell.world <= MAX_PROCESSES]


def whole_matrix() -> list[Cell]:
    """Every legal cell of the layout settings, each with one of the micro-batch counts, of the objectives that are off,
    and of ``compile``, in turn."""
    turns = list(itertools.product(AXES["compile"], AXES["off"], AXES["micro_batches"]))
    whole = []
    alike = {"micro_batches": (1,), "off": ("",), "compile": ("none",)}
    for index, cell in enumerate(cell for cell in cells(**alike) if legal(cell)):
        compiled, off, micro = turns[(index + index // len(turns)) % len(turns)]  # shifted so that it meets all
        whole.append(replace(cell, off=off, micro_batches=micro, compile=compiled))
    return whole


def basic_layouts() -> list[Cell]:
    """All of tensor- and data-parallel size, ZeRO stage, micro-batches and recomputation on up to four processes."""
    alike = {
        "pp": (1,), "schedule": ("1f1b",), "precision": ("fp32",), "sequence_parallel": (False,), "off": ("",),
        "compile": ("none",),
    }
    every = cells(tp=(1, 2), recompute=("none", "full"), micro_batches=(1, 2), **alike)
    return [cell for cell in every if cell.world <= 4]


def pairs(cell: Cell) -> Iterable[tuple]:
    """Each two settings of a cell."""
    return itertools.combinations(((f.name, getattr(cell, f.name)) for f in fields(cell)), 2)


def pairwise(candidates: list[Cell]) -> list[Cell]:
    """A small subset of the cells in which every pair of settings that they have appears; deterministic.

    Greedy: always the cell with most pairs that are still missing, the more expensive ones a little behind.
    """
    number = {pair: index for index, pair in enumerate(dict.fromkeys(p for cell in candidates for p in pairs(cell)))}
    masks = [(cell, sum(1 << number[pair] for pair in pairs(cell)), cell.cost**0.4) for cell in candidates]
    missing, chosen = (1 << len(number)) - 1, []
    while missing:
        cell, mask, _ = max(masks, key=lambda item: (item[1] & missing).bit_count() / item[2])
        chosen.append(cell)
        missing &= ~mask
    return chosen


@dataclass
class Run(Outcome):
    """A tiny run on this world's processes, through the engine, step by step."""

    config: Config = field(default_factory=tiny_config)

    def __post_init__(self) -> None:
        p = self.config.parallel
        self.mesh = build_mesh(p.tp, p.pp, p.virtual_stages, p.sequence_parallel)
        self.engine, self.model = build_engine(self.config, self.mesh)
        self.data, self.passes = data_of(self.config, self.mesh), passes_of(self.config, self.mesh)

    def train(self, first: int = 0, end: int | None = None) -> Run:
        """Steps ``first`` to ``end`` (not included)."""
        for step in range(first, self.config.train.steps if end is None else end):
            found, result = train_step(
                self.engine, self.passes, self.data(step), lr_of=learning_rate(self.config, step),
                averaged=self.model.averaged(), follow=follow(self.config),
            )
            values = torch.stack([value.float() for value in found.values()])
            self.terms.append(dict(zip(found, (all_reduce(values, self.mesh, "dp") / self.mesh.dp).tolist())))
            self.norms.append({"all": float(result.grad_norm)} | {k: float(v) for k, v in result.tower_norms.items()})
        return self

    def outcome(self) -> Outcome:
        """Terms, norms and weights, without the engine; a collective call."""
        # Without the moments that ``export`` would add: gathered one by one they would take as long as the steps.
        engine = self.engine
        own = {
            name: engine._whole(parameter, "model").detach().clone() for parameter, name in engine.names.items()
        }
        stages = all_gather_object(own if self.mesh.tp_rank == self.mesh.dp_rank == 0 else {})
        weights = {name: value for stage in stages for name, value in stage.items()}
        assert len(weights) == sum(map(len, stages)), "a parameter is on two pipeline ranks"
        return Outcome(self.terms, self.norms, weights)


def run_cell(config: Config) -> Outcome:
    """As ``tiny_run.reference``, on this world's processes through the engine."""
    run = Run(config=config).train()
    outcome = run.outcome()
    run.engine.close()
    return outcome


def run_cells(
    rank: int, chosen: list[Cell], extra: dict | None = None, backend: str = compiling.BACKEND
) -> list[tuple[Outcome, float]]:
    """Outcome and seconds of each, on the first rank; what is compiled goes through torch's ``backend``."""
    compiling.BACKEND = backend
    results = []
    for cell in chosen:
        begin = time.perf_counter()
        results.append((run_cell(cell.config(extra)), time.perf_counter() - begin))
    return results if rank == 0 else []


_references: dict[str, Outcome] = {}


def verdict(cell: Cell, outcome: Outcome, extra: dict | None = None) -> tuple[str, bool]:
    """The row of the table, and whether the numbers agree with the single process'."""
    config = cell.plain_config(extra)
    plain = repr(config)  # the same for cells that differ in the layout alone
    if plain not in _references:
        _references[plain] = reference(config)
    found = differences(outcome, _references[plain])
    good = found.exact if cell.precision == "fp32" else found.near
    return f"{cell}  {found}  {'equal' if good else 'DIFFERS'}", good


@dataclass(frozen=True)
class Differences:
    """Relative differences: the largest of a loss term, of a gradient norm (whole or of a tower), and of a weight, by
    the larger of its tensor's largest entry and 0.01; and the largest of a weight tensor in the L2 norm."""

    terms: float
    norms: float
    weights: float
    tensors: float

    @property
    def exact(self) -> bool:
        """Equal, but for the rounding of float32."""
        return max(self.terms, self.norms, self.weights) < 1e-5

    @property
    def near(self) -> bool:
        """Equal, but for the rounding of bfloat16, where other parts of a sum are rounded, each to 2^-9 of it. In a
        term, a mean over many, that comes to less than one such rounding twice; a gradient is made of products of
        rounded numbers, and a weight moves by a gradient that the optimizer has brought to a common size."""
        return self.terms < 2**-8 and self.norms < 2**-6 and self.tensors < 2**-5

    def __str__(self) -> str:
        return f"terms {self.terms:.1e}  norms {self.norms:.1e}  weights {self.weights:.1e}"


def differences(got: Outcome, expected: Outcome) -> Differences:
    assert got.weights.keys() == expected.weights.keys()
    assert len(got.terms) == len(expected.terms) and len(got.norms) == len(expected.norms)
    off = {k: (got.weights[k] - e).abs() for k, e in expected.weights.items()}
    return Differences(
        _largest(got.terms, expected.terms), _largest(got.norms, expected.norms),
        max(float(off[k].max() / e.abs().max().clamp(min=1e-2)) for k, e in expected.weights.items()),
        max(float(off[k].norm() / e.norm().clamp(min=1e-2)) for k, e in expected.weights.items()),
    )


def _largest(got: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    found = []
    for g, e in zip(got, expected):
        assert g.keys() == e.keys()
        found += [abs(g[k] - e[k]) / max(abs(e[k]), 1e-12) for k in e]
    assert all(map(math.isfinite, found))
    return max(found)
