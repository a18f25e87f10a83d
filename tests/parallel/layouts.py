"""One cell of the layout matrix on the processes of this world, compared with plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_run import build_engine, data_of, learning_rate, merged, passes_of, tiny_config
from torch import Tensor

from megavtp.config.schema import Config
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.deepspeed_adapter import read_parameter
from megavtp.parallel.mesh import build_mesh
from megavtp.parallel.passes import execute


@dataclass(frozen=True)
class Cell:
    tp: int
    dp: int
    zero: int
    micro_batches: int
    recompute: bool

    @property
    def world(self) -> int:
        return self.tp * self.dp

    def config(self, extra: dict | None = None) -> Config:
        size = lambda batch: batch // self.dp // self.micro_batches  # noqa: E731
        base = tiny_config(extra)
        objectives = {
            "contrastive": {"micro_batch": size(base.train.batch_size)},
            "self_distillation": {"micro_batch": size(base.objectives.self_distillation.batch)},
            "reconstruction": {"micro_batch": size(base.objectives.reconstruction.batch)},
        }
        layout = {
            "objectives": objectives,
            "parallel": {"tp": self.tp, "zero_stage": self.zero, "recompute": "full" if self.recompute else "none"},
        }
        return tiny_config(merged(extra or {}, layout), self.world)


LAYOUTS = [(tp, dp) for tp in (1, 2) for dp in (1, 2, 4) if tp * dp <= 4]
CELLS = [
    Cell(tp, dp, zero, micro, recompute)
    for (tp, dp), zero, micro, recompute in itertools.product(LAYOUTS, (0, 1, 2, 3), (1, 2), (False, True))
]


class Run:
    """A tiny run on this world's processes, through the engine, step by step.

    Attributes:
        terms: per step the loss terms, averaged over dp.
        norms: per step the gradient norm.
    """

    def __init__(self, config: Config):
        self.config = config
        p = config.parallel
        self.mesh = build_mesh(p.tp, p.pp, p.virtual_stages, p.sequence_parallel)
        self.engine, self.model = build_engine(config, self.mesh)
        self.data, self.passes = data_of(config, self.mesh), passes_of(config, self.mesh)
        self.terms: list[dict[str, float]] = []
        self.norms: list[float] = []

    def train(self, first: int = 0, end: int | None = None, after_pass: Callable[[str], None] | None = None) -> Run:
        """Steps ``first`` to ``end`` (not included); ``after_pass`` is told the name of each pass that is through."""
        for step in range(first, self.config.train.steps if end is None else end):
            self.engine.set_lr(learning_rate(self.config, step))
            self.engine.begin_step()
            found: dict[str, Tensor] = {}
            for objective in self.passes:
                found |= execute(objective, self.engine, self.data(step))
                if after_pass is not None:
                    after_pass(objective.name)
            values = torch.stack([value.float() for value in found.values()])
            self.terms.append(dict(zip(found, (all_reduce(values, self.mesh, "dp") / self.mesh.dp).tolist())))
            self.norms.append(float(self.engine.step().grad_norm))
            self.engine.lerp(self._pairs(), 1 - self.config.objectives.self_distillation.teacher_momentum)
        return self

    def _pairs(self) -> list:
        return self.model.teacher_pairs() if "self_distillation" in self.model.objectives else []

    def weights(self) -> dict[str, Tensor]:
        """All of them, whole, by name."""
        # Without the moments that ``export`` would add: gathered one by one they would take as long as the steps.
        engine = self.engine
        return {
            name: engine._whole(read_parameter(engine._engine, parameter), parameter).detach().clone()
            for parameter, name in engine.names.items()
        }


def run_cell(config: Config) -> tuple[list[dict[str, float]], list[float], dict[str, Tensor]]:
    """As ``tiny_run.reference``, on this world's processes through the engine."""
    run = Run(config).train()
    weights = run.weights()
    run.engine.close()
    return run.terms, run.norms, weights


def relative(got: float, expected: float) -> float:
    return abs(got - expected) / max(abs(expected), 1e-12)


def differences(got: tuple, expected: tuple) -> tuple[float, float, float]:
    """Largest relative difference of loss terms and of norms; of weights, relative to the larger of their largest entry
    and 0.01."""
    terms = max(relative(g[k], e[k]) for g, e in zip(got[0], expected[0], strict=True) for k in e)
    norms = max(relative(g, e) for g, e in zip(got[1], expected[1], strict=True))
    assert got[2].keys() == expected[2].keys()
    weights = max(
        float((got[2][k] - e).abs().max() / e.abs().max().clamp(min=1e-2)) for k, e in expected[2].items()
    )
    return terms, norms, weights
