"""A tiny DiT's training in one cell of the layout matrix, and by plain torch on one process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megavtp.config.load import from_dict
from megavtp.dit.batch import LatentStepDataset
from megavtp.dit.config import DiTConfig
from megavtp.dit.flow_matching import flow_matching_terms, straight_path
from megavtp.dit.model.average import AveragedDiT
from megavtp.dit.model.build import build_averaged_dit
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.validate import validate_dit, with_latents
from megavtp.latents.folder import LatentFolder
from megavtp.models.init import constant, fill_parameters, normal
from megavtp.parallel.collectives import all_gather_object, all_reduce
from megavtp.parallel.engine_state import MOMENTS
from megavtp.parallel.mesh import SINGLE
from megavtp.training.step import train_step

STEPS = 3  # of a run
BASE = {
    "seed": 3, "ema_momentum": 0.9,
    "model": {"width": 48, "depth": 5, "heads": 4, "patch_size": 2, "qk_norm": True},
    "flow_matching": {"condition_dropout": 0.3, "time_mu": -0.5},
    "data": {"streams": 4, "workers": 0, "shuffle_block": 4},
    # A large epsilon: plain Adam turns the rounding noise of gradients that are zero in theory into full-size updates.
    "train": {
        "steps": STEPS, "batch_size": 16,
        "optimizer": {"lr": 0.01, "min_lr": 0.01, "warmup_steps": 0, "eps": 1e-2, "clip_grad": 0.5},
    },
}
# Adaptive norms start at zero: without values of their own most weights would have no gradient.
_VALUES = [
    (r".*norm\w*\.weight", constant(1.2)), (r".*(adaLN_modulation|embedding_table).*", normal(0.3)),
    (r"x_embedder.*", normal(0.5)), (r".*", normal(0.15)),
]


@dataclass(frozen=True)
class Cell:
    tp: int
    pp: int
    dp: int
    zero: int
    micro_batches: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    condition: str = "class"
    precision: str = "fp32"
    sequence_parallel: bool = False
    compile: str = "none"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def config(self, root: Path, **changes) -> DiTConfig:
        layout = {
            "tp": self.tp, "pp": self.pp, "zero_stage": self.zero, "recompute": self.recompute,
            "precision": self.precision, "schedule": self.schedule, "sequence_parallel": self.sequence_parallel,
            "virtual_stages": 2 if self.schedule == "interleaved_1f1b" else 1, "compile": self.compile,
        }
        sections = {
            **BASE, "parallel": layout, "data": {**BASE["data"], "root": str(root)},
            "model": {**BASE["model"], "condition": self.condition}, **changes,
        }
        share = BASE["train"]["batch_size"] // self.dp
        sections["flow_matching"] = {**BASE["flow_matching"], "micro_batch": share // self.micro_batches}
        return validate_dit(from_dict(sections, DiTConfig), self.world)


SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b")


def cells() -> list[Cell]:
    """Every tp, pp and dp of 1 and 2 with two of the ZeRO stages, so that each pair of these settings occurs, and the
    other settings in turn; and one of tp 4."""
    found = []
    for tp, pp, dp in itertools.product((1, 2), repeat=3):
        for zero in ((0, 3), (1, 2))[(tp + pp + dp) % 2]:
            turn = len(found)
            found.append(Cell(
                tp, pp, dp, zero, micro_batches=(4, 2, 1)[turn % 3],
                schedule=SCHEDULES[turn // 2 % 3] if pp > 1 else "1f1b",
                recompute=("none", "full", "selective")[(turn + turn // 3) % 3],
                condition=("class", "caption")[turn % 2], sequence_parallel=tp > 1 and turn % 4 in (1, 2),
            ))
    return [*found, Cell(4, 1, 1, 1, 2, sequence_parallel=True)]


def valued(config: DiTConfig) -> AveragedDiT:
    """The whole model, with no weight at zero."""
    model = build_averaged_dit(config.model, seed=config.seed)
    fill_parameters(model.dit.named_parameters(), _VALUES, SINGLE, 5)
    model.start_average()
    return model


@dataclass
class Outcome:
    """Per step the loss terms and the gradient norm; weights, whole, of the DiT and its average."""

    terms: list[dict[str, float]]
    norms: list[float]
    weights: dict[str, Tensor]

    def difference(self, other: Outcome) -> float:
        """Largest relative difference; of weights, relative to the larger of their largest entry and 0.01."""
        assert self.weights.keys() == other.weights.keys()
        pairs = [(a[k], b[k]) for a, b in zip(self.terms, other.terms, strict=True) for k in b]
        pairs += list(zip(self.norms, other.norms, strict=True))
        scalars = max(abs(a - b) / abs(b) for a, b in pairs)
        weights = max(
            float((self.weights[k] - w).abs().max() / w.abs().max().clamp(min=1e-2)) for k, w in other.weights.items()
        )
        return max(scalars, weights)


class CellRun:
    """A cell on this world's processes, through the engine, step by step."""

    def __init__(self, config: DiTConfig):
        self.recipe = recipe = DiTTraining(config, torch.device("cpu"))
        recipe.open()
        recipe.build()
        self.config, self.mesh, self.engine = recipe.config, recipe.mesh, recipe.engine
        weights = {f"model/{name}": tensor for name, tensor in valued(self.config).state_dict().items()}
        for name, tensor in list(weights.items()):
            weights |= {f"{moment}/{name.removeprefix('model/')}": torch.zeros_like(tensor) for moment in MOMENTS}
        self.engine.load(weights.__getitem__, 0)
        self.data = LatentStepDataset(recipe.folder, self.config, self.mesh.dp_rank, self.mesh.dp)
        self.passes = recipe.passes()
        self.outcome = Outcome([], [], {})

    def train(self, first: int, end: int) -> Outcome:
        for step in range(first, end):
            terms, result = train_step(
                self.engine, self.passes, self.data[step], averaged=self.recipe.averaged(),
                follow=1 - self.config.ema_momentum,
                lr_of=lambda group: self.config.train.optimizer.lr * group["lr_scale"],
            )
            values = all_reduce(torch.stack(list(terms.values())), self.mesh, "dp") / self.mesh.dp
            self.outcome.terms.append(dict(zip(terms, values.tolist())))
            self.outcome.norms.append(float(result.grad_norm))
        own = {name: tensor.clone() for name, tensor in self.engine.export(lambda number: True).items()}
        for tensors in all_gather_object(own):  # a pipeline rank has its own part of the model
            named = ((name.removeprefix("model/"), t) for name, t in tensors.items() if name.startswith("model/"))
            self.outcome.weights.update(named)
        return self.outcome


def plain(config: DiTConfig, steps: int) -> Outcome:
    """By torch alone on one process, the whole batch at once."""
    folder = LatentFolder(config.data.root)
    config = with_latents(replace(config, parallel=replace(config.parallel, recompute="none")), folder)
    model = valued(config)
    data, settings = LatentStepDataset(folder, config), config.train.optimizer
    groups = [
        {"params": [p for p in model.dit.parameters() if (p.ndim > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps)
    outcome = Outcome([], [], {})
    for step in range(steps):
        batch = data[step]
        points, target = straight_path(batch.latents, batch.noise, batch.times)
        velocity = model.dit(points, batch.times, batch.conditions)
        terms = flow_matching_terms(velocity, target, samples_total_local=len(points))
        optimizer.zero_grad()
        (terms["mse"] + config.flow_matching.cosine_weight * terms["cosine"]).backward()
        outcome.terms.append({f"flow_matching/{name}": value.item() for name, value in terms.items()})
        outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(model.dit.parameters(), settings.clip_grad)))
        optimizer.step()
        with torch.no_grad():
            for average, trained in model.averaged():
                average.lerp_(trained, 1 - config.ema_momentum)
    outcome.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return outcome
