"""A few small layers with two losses and a teacher: the engine's guards, one at a time, against plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.engine import Engine
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sharding import cut, shard_of

WIDTH, ROWS = 8, 8  # features; samples of the global batch


class Toy(nn.Module):
    """A trunk of two tensor-parallel and two plain layers, heads ``a`` and ``b``, and a frozen teacher."""

    def __init__(self, mesh: Mesh = SINGLE, scalar: bool = False):
        super().__init__()
        self.column = ColumnParallelLinear(WIDTH, 2 * WIDTH, mesh=mesh)
        self.row = RowParallelLinear(2 * WIDTH, WIDTH, mesh=mesh)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.teacher = nn.Linear(WIDTH, 4).requires_grad_(False)
        self.scalar = nn.Parameter(torch.ones(())) if scalar else None
        self.on_gradient = None  # called when a backward has passed all layers but the first
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                shape, shard = list(parameter.shape), shard_of(parameter)
                if shard is not None:
                    shape[shard.dim] *= mesh.tp
                whole = torch.randn(shape, generator=generator) / 2
                parameter.copy_(cut(whole, shard, mesh.tp_rank, mesh.tp))

    def forward(self, mode: str, x: Tensor) -> Tensor:
        if mode == "teacher":
            return self.teacher(x)
        hidden = self.column(x)
        if self.on_gradient is not None and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.on_gradient())
        hidden = self.second(self.first(self.row(hidden.tanh())).tanh()).tanh()
        out = (self.a if mode == "a" else self.b)(hidden)
        return out if self.scalar is None else out * self.scalar

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.teacher.parameters(), self.a.parameters()))


def optimizer_of(module: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """Two groups. The large epsilon keeps rounding noise from becoming full-size updates."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, eps=1e-2)


# A step is a list of events: forward ("F") or backward ("B") of the loss through head a or b.
ALTERNATING = ["Fa", "Ba", "Fb", "Bb"]
CONSECUTIVE = ["Fa", "Fb", "Ba", "Bb"]
ONLY_A = ["Fa", "Ba"]
Script = Sequence[Sequence[str]]


def rows_of(step: int, head: str, mesh: Mesh, poison: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs and targets of this rank. ``poison``: the last row of the global batch is not a number."""
    generator = torch.Generator().manual_seed(10 * step + (head == "b"))
    x, target = (torch.randn(ROWS, width, generator=generator) for width in (WIDTH, 4))
    if poison:
        x[-1] = float("nan")
    return x.chunk(mesh.dp)[mesh.dp_rank], target.chunk(mesh.dp)[mesh.dp_rank]


@dataclass
class Outcome:
    """Weights by name, whole; per step the gradient norm and whether the update was applied."""

    norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    teacher: list[Tensor] = field(default_factory=list)  # its output after each step

    def difference(self, other: Outcome) -> float:
        """Largest absolute difference of weights and, relative, of norms."""
        names = [name for name in other.tensors if name.startswith("model/")]
        weights = max(float((self.tensors[name] - other.tensors[name]).abs().max()) for name in names)
        norms = max(abs(a - b) / b for a, b in zip(self.norms, other.norms, strict=True))
        return max(weights, norms)


def make(mesh: Mesh, zero: int, clip: float = 0.0, extra: dict | None = None, **options: Any) -> tuple[Engine, Toy]:
    module = Toy(mesh, **options)
    return Engine(module, optimizer_of(module), mesh, zero_stage=zero, clip_grad=clip, extra=extra or {}), module


def play(engine: Engine, module: Toy, script: Script, first: int = 0, poisoned: int | None = None) -> Outcome:
    """Run the steps of a script on an engine, the teacher following head a."""
    outcome = Outcome()
    for step, events in enumerate(script, first):
        engine.begin_step()
        losses = {}
        for number, (kind, head) in enumerate(events, 1):
            x, target = rows_of(step, head, engine.mesh, step == poisoned)
            if kind == "F":
                losses[head] = (engine(head, x) - target).square().mean()
            else:
                if number == len(events):
                    engine.announce_last_backward()
                engine.backward(losses.pop(head))
        result = engine.step()
        outcome.norms.append(float(result.grad_norm))
        outcome.applied.append(result.applied)
        if result.applied:
            engine.lerp(module.pairs(), 0.5)
        with torch.no_grad():
            mean = all_reduce(engine("teacher", rows_of(0, "a", engine.mesh)[0]).mean(0), engine.mesh, "dp")
        outcome.teacher.append(mean / engine.mesh.dp)
    outcome.tensors = {name: value.clone() for name, value in engine.export(lambda number: True).items()}
    return outcome


def run(mesh: Mesh, zero: int, script: Script, clip: float = 0.0, extra: dict | None = None, **options: Any) -> Outcome:
    engine, module = make(mesh, zero, clip, extra)
    outcome = play(engine, module, script, **options)
    engine.close()
    return outcome


def plain(script: Script, clip: float = 0.0, skip: int | None = None) -> Outcome:
    """The same in one process without an engine; a missing gradient counts as zero; step ``skip`` is left out."""
    module, outcome = Toy(), Outcome()
    optimizer, trained = optimizer_of(module), [p for p in module.parameters() if p.requires_grad]
    for step, events in enumerate(script):
        if step == skip:
            continue
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for kind, head in events:
            if kind == "B":
                x, target = rows_of(step, head, SINGLE)
                (module(head, x) - target).square().mean().backward()
        outcome.norms.append(float(nn.utils.clip_grad_norm_(trained, clip or float("inf"))))
        outcome.applied.append(True)
        optimizer.step()
        with torch.no_grad():
            for teacher, student in module.pairs():
                teacher.lerp_(student, 0.5)
            outcome.teacher.append(module("teacher", rows_of(0, "a", SINGLE)[0]).mean(0))
    outcome.tensors = {f"model/{name}": p.detach().clone() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if p.requires_grad:
                outcome.tensors[f"{moment}/{name}"] = optimizer.state[p][moment].clone()
    return outcome
