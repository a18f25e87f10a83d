"""The optimizer step of every recipe, on every layout. What the equivalence matrix proves is this function."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from megavtp.launch import phase
from megavtp.parallel.engine import Engine, StepResult
from megavtp.parallel.passes import Pass, execute

Pairs = Sequence[tuple[nn.Parameter, nn.Parameter]]


def train_step(
    engine: Engine, passes: Sequence[Pass], batch: Any, *, lr_of: Callable[[dict[str, Any]], float],
    averaged: Pairs = (), follow: float = 0.0,
) -> tuple[dict[str, Tensor], StepResult]:
    """Run all passes over one batch, then update, then let the average follow; or change nothing, on any rank.

    Args:
        batch: this rank's share of a step; ``batch.step`` counts from 0.
        lr_of: gives a parameter group's learning rate in this step.
        averaged: pairs of an averaged and a trained parameter, such as teacher and student.
        follow: the share by which the average moves towards the trained weights.

    Returns:
        The loss terms by name, detached and local (their mean over data-parallel ranks is the term), and the result
        of the step, which every rank skips if a term or the gradient is not finite on any.
    """
    engine.set_lr(lr_of)
    engine.begin_step()
    before = [objective.state() for objective in passes]
    terms: dict[str, Tensor] = {}
    for objective in passes:
        phase.enter(f"step {batch.step + 1}, pass {objective.name}")
        terms |= execute(objective, engine, batch, objective is passes[-1])  # gradients add up in the engine
    phase.enter(f"step {batch.step + 1}, update")
    result = engine.step()
    if result.applied:
        engine.lerp(averaged, follow)
    else:
        for objective, state in zip(passes, before):
            objective.load_state(state)  # a skipped step leaves no trace in them
    return terms, result
