"""``--replay STEP`` does a step of a run again and watches every module and gradient. It writes nothing."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from megavtp.errors import UserError
from megavtp.launch import phase
from megavtp.parallel.collectives import all_gather_object
from megavtp.training.recipe import Recipe
from megavtp.training.telemetry import Telemetry
from megavtp.training.trainer import Trainer

NOT_FINITE = 3  # exit status of a replay that found something


class Unrecorded(Telemetry):
    """Telemetry that prints events and records nothing."""

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        if self.is_main:
            self.progress.note({"kind": kind, "step": step, **fields})


def check_replayed(step: int | None, steps: int) -> None:
    """Raise a UserError if a run of ``steps`` steps has no such step; they count from 1."""
    if step is not None and not 1 <= step <= steps:
        raise UserError(f"--replay {step}: the run has the steps 1 to {steps} (train.steps)")


def replay_step(recipe: Recipe, step: int) -> int:
    """Train from the last checkpoint before ``step`` to its end, as the run did, and print what in it was not finite.

    Returns the exit status: 0, or ``NOT_FINITE``.
    """
    phase.enter("reading the checkpoint", slow=True)
    trainer = Trainer(recipe, Unrecorded(recipe.config, recipe.mesh, recipe.flops_per_step()))
    trainer.max_skipped = math.inf  # the run may have ended at this very step, for the number that it had skipped
    start = trainer.resume(last=step - 1)
    phase.enter("loading the first batch", slow=True)
    loader = recipe.loader(start)
    try:
        for batch in loader:
            if batch.step + 1 == step:
                values, faults = _observed(trainer, batch)
                break
            trainer.do_step(batch)
            phase.enter(f"step {batch.step + 2}, data")
    finally:
        loader.close()
    if recipe.mesh.rank == 0:
        for line in (*values, *(faults or ["all terms, outputs of modules and gradients are finite"])):
            print(f"step {step}: {line}", flush=True)
    return NOT_FINITE if faults else 0


def _observed(trainer: Trainer, batch: Any) -> tuple[list[str], list[str]]:
    """Do the step; return lines about the values that are finite, and lines about what is not."""
    with _watched(trainer.engine.module) as found:
        terms, result = trainer.do_step(batch)
    own = {name: float(value) for name, value in terms.items()}
    everyone = all_gather_object((own, found))
    values: list[str] = []
    faults: list[str] = []
    for name in own:
        ranks = [terms_there[name] for terms_there, _ in everyone]
        bad = [str(rank) for rank, value in enumerate(ranks) if not math.isfinite(value)]
        (faults if bad else values).append(
            f"{name} {sum(ranks) / len(ranks):.8g}" + (f", not finite on rank {', '.join(bad)}" if bad else "")
        )
    towers = ", ".join(f"{name} {float(norm):.8g}" for name, norm in result.tower_norms.items())
    (values if result.applied else faults).append(f"gradient norm {float(result.grad_norm):.8g} ({towers})")
    mesh = trainer.engine.mesh
    for rank, (_, lines) in enumerate(everyone):
        coordinates = f"dp {rank // (mesh.pp * mesh.tp)}, pp {rank // mesh.tp % mesh.pp}, tp {rank % mesh.tp}"
        faults += [f"rank {rank} ({coordinates}), {line}" for line in lines]
    return values, faults


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """Yield a list that gets a line for the first module of each tower whose output is not finite, and for the first
    parameter whose gradient is not.

    First is meant in the order of the forward and of the backward. Each look waits for the device. The gradients are
    this rank's own of one micro-batch, before they are added up, as ZeRO keeps them flattened.
    """
    found: list[str] = []
    told: set[tuple[str, str]] = set()

    def note(kind: str, name: str, value: Any, given: Any = None) -> None:
        key = kind, name.partition(".")[0]  # the tower, as the model names it
        if key not in told and (faults := _faults(value)):
            told.add(key)
            cause = "" if given is None or _faults(given) else "; what it was given is finite"
            found.append(f"{phase.current().name.rpartition(', ')[2]}: {kind} {name}{faults}{cause}")

    def note_output(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note("output of", name, output, given=(args, kwargs))

    with ExitStack() as hooks:
        for name, inner in module.named_modules():
            if name:
                hooks.enter_context(inner.register_forward_hook(partial(note_output, name), with_kwargs=True))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hooks.enter_context(parameter.register_hook(partial(note, "gradient of", name)))
        yield found


def _faults(value: Any) -> str:
    """Describe each tensor in ``value`` that is not finite, and how many of its numbers are not; "" if all are."""
    text = ""
    for x in tree_leaves(value):
        if isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta:
            if count := int((~x.detach().isfinite()).sum()):
                text += f", {count} of {x.numel()} numbers in {tuple(x.shape)}"
    return text
