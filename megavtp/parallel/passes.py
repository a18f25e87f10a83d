"""A pass: one objective's trip through its towers, declared free of any layout, and how it is executed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor


class Runner(Protocol):
    """What executes a pass: an ``Engine``, or in tests a plain module."""

    def __call__(self, mode: str, **inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...


class Pass(ABC):
    """One objective. Subclasses say what flows in, what comes out, and which loss closes it.

    Loss terms are local values whose mean over data-parallel ranks is the global term, summed over micro-batches.

    Attributes:
        name: prefix of its terms.
        mode: which forward of the model it calls.
        weight: of the objective in the total loss.
        term_weights: of its terms inside the objective; 1 where none is given.
        over_batch: whether it has terms over the whole batch (``global_terms``).
    """

    name: str
    mode: str
    weight: float
    term_weights: Mapping[str, float] = MappingProxyType({})
    over_batch: bool = False

    @abstractmethod
    def prepare(self, run: Runner, batch: Any) -> int:
        """Take this rank's share of a step, do forward-only work (a teacher); return the number of micro-batches."""

    @abstractmethod
    def inputs(self, micro: int) -> dict[str, Any]:
        """Keyword inputs of the forward of one micro-batch."""

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        """Loss terms that need only this micro-batch, unweighted."""
        return {}

    def global_inputs(self, outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """What the terms over the whole batch are made of: (per-sample rows, shared values).

        Rows (m, ...) of all micro-batches are concatenated along dim 0; shared values are the same in each.
        """
        return [], []

    def global_terms(self, rows: list[Tensor], shared: list[Tensor]) -> dict[str, Tensor]:
        """Loss terms over the whole batch, unweighted."""
        return {}

    def first_pass_inputs(self, micro: int) -> dict[str, Any]:
        """Inputs of a forward that only has to give ``global_inputs``; by default the full forward's."""
        return self.inputs(micro)

    def weighted(self, terms: dict[str, Tensor]) -> list[Tensor]:
        return [value * self.term_weights.get(name, 1.0) for name, value in terms.items()]


def execute(objective: Pass, run: Runner, batch: Any) -> dict[str, Tensor]:
    """Forward and backward of all micro-batches of a pass; returns its terms, detached, under ``name/term``.

    With more than one micro-batch, terms over the whole batch are exact by a second forward (GradCache, arXiv
    2101.06983): the first, without graph, collects all rows; the loss on them gives their gradients; the second
    forward is seeded with these. Random choices are inputs, so both forwards agree.
    """
    count = objective.prepare(run, batch)
    terms: dict[str, Tensor] = {}
    seeds: _Seeds | None = None
    if count > 1 and objective.over_batch:
        seeds, terms = _first_pass(objective, run, count)
    for micro in range(count):
        outputs = run(objective.mode, **objective.inputs(micro))
        parts = objective.local_terms(outputs, micro)
        for name, value in parts.items():
            terms[name] = terms[name] + value.detach() if name in terms else value.detach()
        total = objective.weighted(parts)
        if seeds is not None:
            total += seeds.surrogates(objective.global_inputs(outputs), micro)
        elif objective.over_batch:
            whole = objective.global_terms(*objective.global_inputs(outputs))
            terms |= {name: value.detach() for name, value in whole.items()}
            total += objective.weighted(whole)
        run.backward(sum(total) * objective.weight)
    return {f"{objective.name}/{name}": value for name, value in terms.items()}


@dataclass(frozen=True)
class _Seeds:
    """Gradients of the whole-batch terms: of each row tensor by micro-batch, and of the shared values."""

    rows: list[tuple[Tensor, ...]]
    shared: tuple[Tensor, ...]

    def surrogates(self, over_batch: tuple[list[Tensor], list[Tensor]], micro: int) -> list[Tensor]:
        """Scalars whose gradient is that of the whole-batch terms through this micro-batch."""
        rows, shared = over_batch
        scalars = [(row * by_micro[micro]).sum() for row, by_micro in zip(rows, self.rows)]
        if micro == 0:  # a value that every micro-batch shares takes its gradient once
            scalars += [(value * gradient).sum() for value, gradient in zip(shared, self.shared)]
        return scalars


def _first_pass(objective: Pass, run: Runner, count: int) -> tuple[_Seeds, dict[str, Tensor]]:
    with torch.no_grad():
        collected = [
            objective.global_inputs(run(objective.mode, **objective.first_pass_inputs(micro))) for micro in range(count)
        ]
    sizes = [rows[0].shape[0] for rows, _ in collected]
    rows = [torch.cat(parts).requires_grad_() for parts in zip(*(rows for rows, _ in collected))]
    shared = [value.detach().requires_grad_() for value in collected[0][1]]
    terms = objective.global_terms(rows, shared)
    gradients = torch.autograd.grad(sum(objective.weighted(terms)), rows + shared)
    seeds = _Seeds([g.split(sizes) for g in gradients[: len(rows)]], gradients[len(rows) :])
    return seeds, {name: value.detach() for name, value in terms.items()}
