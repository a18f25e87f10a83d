"""A pass: one objective's way through the towers, declared independently of any layout, and its execution."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavtp.parallel.messages import broadcast_last_stage, broadcast_last_stage_object
from megavtp.parallel.pipeline import Runner, forward, train
from megavtp.parallel.sharding import Shard


class Pass(ABC):
    """One objective. Subclasses say what goes in, what comes out, and which loss is computed from it.

    Loss terms are local values whose mean over data-parallel ranks is the global term, summed over micro-batches.
    Under pipeline parallelism every rank prepares and gives inputs, but only the last one has outputs and terms.
    """

    name: str  # prefix of its terms
    mode: str  # which forward of the model it calls, and so which route through the towers
    weight: float  # in the total loss
    term_weights: Mapping[str, float] = MappingProxyType({})  # inside the objective; 1 where none is given
    over_batch: bool = False  # whether it has terms over the whole batch (``global_terms``)
    term_names: tuple[str, ...] | None = None  # filled in by the first execution
    monitor_names: tuple[str, ...] = ()  # of ``monitors`` in this step, set by ``prepare`` on all ranks
    state_shard: Shard | None = None  # how tensors of ``state`` are cut over tensor-parallel ranks
    on_last_stage: bool = False  # its one tower is whole on the last pipeline rank, which runs it alone

    @abstractmethod
    def prepare(self, run: Runner, batch: Any) -> int:
        """Take this rank's share of a step and run what has no backward (a teacher); return how many micro-batches."""

    @abstractmethod
    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        """Return the keyword inputs of the forward of one micro-batch, for the first pipeline stage or a later one.

        What only the first stage reads may be a meta tensor in those for a later one.
        """

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        """Return the loss terms that need only this micro-batch, unweighted."""
        return {}

    def global_inputs(self, outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the terms over the whole batch are computed from: (per-sample rows, shared values).

        Rows (m, ...) of all micro-batches are concatenated along dim 0; shared values are the same in each. The terms
        may read rows without gradient.
        """
        return [], []

    def global_terms(self, rows: list[Tensor], shared: list[Tensor]) -> dict[str, Tensor]:
        """Return the loss terms over the whole batch, unweighted."""
        return {}

    def monitors(self) -> dict[str, Tensor]:
        """Return numbers about the step that enter no loss, the same on all ranks that have outputs.

        It is called after the backward of all micro-batches, in steps that have ``monitor_names``.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what the pass carries from step to step (a running mean), by its name in a checkpoint.

        A checkpoint takes it from the last pipeline stage. A pass replaces these tensors and never changes them
        in place.
        """
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` has returned."""
        assert not state, f"the pass {self.name} carries nothing from step to step"

    def weighted(self, terms: dict[str, Tensor]) -> list[Tensor]:
        """Weigh each term inside the objective."""
        return [value * self.term_weights.get(name, 1.0) for name, value in terms.items()]


def execute(objective: Pass, run: Runner, batch: Any, ends_step: bool = False) -> dict[str, Tensor]:
    """Run forward and backward of all micro-batches of a pass; return its terms, detached, under ``name/term``, and
    its monitors of this step beside them. ``ends_step``: no other pass of the step follows.

    With more than one micro-batch, terms over the whole batch are exact by a second forward (GradCache, arXiv
    2101.06983): the first, without graph, collects all rows; the loss on them gives their gradients; the second
    forward is seeded with these. Random choices are inputs, so both forwards agree.
    """
    count = objective.prepare(run, batch)
    terms: dict[str, Tensor] = {}
    seeds: _Seeds | None = None

    if count > 1 and objective.over_batch:
        outputs = forward(run, objective.mode, objective.inputs, count)
        if outputs:  # on the last pipeline rank
            seeds, terms = _first_pass(objective, outputs)

    def loss(outputs: Any, micro: int) -> Tensor:
        parts = objective.local_terms(outputs, micro)
        for name, value in parts.items():
            terms[name] = terms[name] + value.detach() if name in terms else value.detach()
        total = objective.weighted(parts)
        if seeds is not None:
            total += seeds.surrogates(objective.global_inputs(outputs), micro)
        elif objective.over_batch:
            whole = objective.global_terms(*objective.global_inputs(outputs))
            terms.update({name: value.detach() for name, value in whole.items()})
            total += objective.weighted(whole)
        return _not_finite_with(terms.values(), reduce(torch.add, total) * objective.weight)

    if not objective.on_last_stage:
        train(run, objective.mode, objective.inputs, count, loss, ends_step)
    elif run.mesh.is_last_stage:
        for micro in range(count):
            run.backward(loss(run(objective.mode, **objective.inputs(micro)), micro))
    return {f"{objective.name}/{name}": value for name, value in _terms_everywhere(objective, run, terms).items()}


def _not_finite_with(terms: Iterable[Tensor], loss: Tensor) -> Tensor:
    """Return ``loss``, with a gradient that is NaN throughout if one of ``terms`` is not finite.

    A term can be NaN while its gradient is finite: L1 against a NaN pixel, or a term of weight 0. With this the norm
    of the gradient, which every rank reads anyway, shows it; nothing more is sent or read.
    """
    finite = torch.stack([term.float() for term in terms]).isfinite().all()
    return loss * torch.where(finite, 1.0, torch.nan)


def _terms_everywhere(objective: Pass, run: Runner, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every pipeline rank the last one's terms and monitors as float32; terms do not wait for the device."""
    found = terms | objective.monitors() if objective.monitor_names and run.mesh.is_last_stage else terms
    if run.mesh.pp == 1:
        return found
    if objective.term_names is None:  # this is sent once a run, as the terms depend on the settings alone
        objective.term_names = broadcast_last_stage_object(tuple(terms), run.mesh)
    names = objective.term_names + objective.monitor_names
    values = torch.empty(len(names), device=run.device)
    if run.mesh.is_last_stage:
        values = torch.stack([found[name].float() for name in names])
    return dict(zip(names, broadcast_last_stage(values, run.mesh).unbind()))


class _Seeds(NamedTuple):
    """The gradients of the whole-batch terms by the row tensors, per micro-batch, and by the shared values.

    A row tensor that the terms read without gradient has None.
    """

    rows: list[tuple[Tensor, ...] | None]
    shared: tuple[Tensor, ...]

    def surrogates(self, over_batch: tuple[list[Tensor], list[Tensor]], micro: int) -> list[Tensor]:
        """Return scalars whose gradient is that of the whole-batch terms through this micro-batch."""
        rows, shared = over_batch
        scalars = [(row * by_micro[micro]).sum() for row, by_micro in zip(rows, self.rows) if by_micro is not None]
        if micro == 0:  # a value that every micro-batch shares takes its gradient once
            scalars += [(value * gradient).sum() for value, gradient in zip(shared, self.shared)]
        return scalars


def _first_pass(objective: Pass, outputs: list[Any]) -> tuple[_Seeds, dict[str, Tensor]]:
    """Compute gradients and values of the whole-batch terms from the micro-batches' outputs."""
    collected = [objective.global_inputs(output) for output in outputs]
    sizes = [rows[0].shape[0] for rows, _ in collected]
    rows = [torch.cat(parts).requires_grad_() for parts in zip(*(rows for rows, _ in collected))]
    shared = [value.detach().requires_grad_() for value in collected[0][1]]
    terms = objective.global_terms(rows, shared)
    total = reduce(torch.add, objective.weighted(terms))
    gradients = torch.autograd.grad(total, rows + shared, allow_unused=True)
    by_rows = [None if g is None else g.split(sizes) for g in gradients[: len(rows)]]
    seeds = _Seeds(by_rows, gradients[len(rows) :])
    return seeds, {name: value.detach() for name, value in terms.items()}
