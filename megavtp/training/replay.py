"""``--replay STEP`` does a step of a run again and watches every module and gradient. It writes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from megavtp.errors import UserError
from megavtp.launch import phase
from megavtp.parallel.collectives import all_gather_object
from megavtp.parallel.engine import StepResult
from megavtp.parallel.mesh import Mesh
from megavtp.training.progress import ProgressLine
from megavtp.training.recipe import Recipe
from megavtp.training.telemetry import Telemetry
from megavtp.training.trainer import Trainer

NOT_FINITE = 3  # exit status of a replay that found something


class Unrecorded(Telemetry):
    """Telemetry that prints events and records nothing."""

    def __init__(self, mesh: Mesh):
        self._is_main, self._progress = mesh.rank == 0, ProgressLine()

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        if self._is_main:
            self._progress.note({"kind": kind, "step": step, **fields})


def check_replayed(step: int | None, steps: int) -> None:
    """Raise a UserError if a run of ``steps`` steps has no such step; they count from 1."""
    if step is not None and not 1 <= step <= steps:
        raise UserError(f"--replay {step}: the run has the steps 1 to {steps} (train.steps)")


def replay_step(recipe: Recipe, step: int) -> int:
    """Train from the last checkpoint before ``step`` to its end, as the run did, and print what in it was not finite.

    Returns the exit status: 0, or ``NOT_FINITE``.
    """
    phase.enter("reading the checkpoint", slow=True)
    trainer = Trainer(recipe, Unrecorded(recipe.mesh))
    trainer.max_skipped = math.inf  # the run may have ended at this very step, for the number that it had skipped
    start = trainer.resume(last=step - 1)
    phase.enter("loading the first batch", slow=True)
    loader = recipe.loader(start)
    try:
        for batch in loader:
            if batch.step + 1 == step:
                report = _observed(trainer, batch)
                break
            trainer.do_step(batch)
            phase.enter(f"step {batch.step + 2}, data")
    finally:
        loader.close()
    if trainer.engine.mesh.rank == 0:
        for line in report.all:
            print(f"step {step}: {line}", flush=True)
    return NOT_FINITE if report.faults else 0


@dataclass(frozen=True)
class _Report:
    """Lines to print: the values that are finite, and what is not."""

    values: list[str]
    faults: list[str]

    @property
    def all(self) -> list[str]:
        return [*self.values, *(self.faults or ["all terms, outputs of modules and gradients are finite"])]


def _observed(trainer: Trainer, batch: Any) -> _Report:
    mesh = trainer.engine.mesh
    with Watch(trainer.engine.module) as watch:
        terms, result = trainer.do_step(batch)
    own = {name: float(value) for name, value in terms.items()}
    of_ranks = all_gather_object((own, watch.found))
    values: list[str] = []
    faults: list[str] = []
    for name in own:
        ranks = [of_rank[name] for of_rank, _ in of_ranks]
        bad = [str(rank) for rank, value in enumerate(ranks) if not math.isfinite(value)]
        (faults if bad else values).append(
            f"{name} {sum(ranks) / len(ranks):.8g}" + (f", not finite on rank {', '.join(bad)}" if bad else "")
        )
    (values if result.applied else faults).append(_norms(result))
    for rank, (_, found) in enumerate(of_ranks):
        faults += [f"rank {rank} ({_place(rank, mesh)}), {line}" for line in found]
    return _Report(values, faults)


def _norms(result: StepResult) -> str:
    towers = ", ".join(f"{name} {float(norm):.8g}" for name, norm in result.tower_norms.items())
    return f"gradient norm {float(result.grad_norm):.8g} ({towers})"


def _place(rank: int, mesh: Mesh) -> str:
    """Return a rank's coordinates, see ``parallel.mesh``."""
    return f"dp {rank // (mesh.pp * mesh.tp)}, pp {rank // mesh.tp % mesh.pp}, tp {rank % mesh.tp}"


class Watch:
    """Finds the first module of each tower whose output is not finite, and the first parameter whose gradient is not.

    It looks while it is entered, in the order of the forward and of the backward, and waits for the device each time.
    The gradients are this rank's own of one micro-batch, before they are added up, as ZeRO keeps them flattened.

    Attributes:
        found: a line for each finding.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._first: set[tuple[str, str]] = set()
        self._handles: list[Any] = []
        self.found: list[str] = []

    def __enter__(self) -> Watch:
        for name, module in self._module.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(partial(self._output, name), with_kwargs=True))
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(partial(self._gradient, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _output(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        told = lambda: "" if _faults((args, kwargs)) else "; what it was given is finite"  # noqa: E731
        self._note("output of", name, output, told)

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self._note("gradient of", name, gradient, str)

    def _note(self, kind: str, name: str, value: Any, more: Callable[[], str]) -> None:
        key = kind, name.partition(".")[0]  # the tower, as the model names it
        if key not in self._first and (faults := _faults(value)):
            self._first.add(key)
            self.found.append(f"{phase.current().name.rpartition(', ')[2]}: {kind} {name}{faults}{more()}")


def _faults(value: Any) -> str:
    """Describe each tensor in ``value`` that is not finite, and how many of its numbers are not; "" if all are."""
    text = ""
    for x in _tensors(value):
        if x.is_floating_point() and not x.is_meta and (count := int((~x.isfinite()).sum())):
            text += f", {count} of {x.numel()} numbers in {tuple(x.shape)}"
    return text


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
