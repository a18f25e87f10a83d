"""The training loop: passes, update, teacher, telemetry, checkpoints. One loop for every recipe and layout."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.reading import has_checkpoints
from megavtp.checkpoint.store import Checkpoint, CheckpointStore, find_latest, open_checkpoint
from megavtp.config.schema import Config
from megavtp.data.batch import Batch
from megavtp.data.loader import Loader
from megavtp.errors import UserError
from megavtp.parallel import phase
from megavtp.parallel.collectives import all_gather_object, broadcast_object, together
from megavtp.parallel.engine import Engine, StepResult
from megavtp.parallel.passes import Pass, execute
from megavtp.parallel.stop_signal import StopSignal
from megavtp.training import state
from megavtp.training.pretraining import SelfDistillationPass
from megavtp.training.schedules import learning_rate
from megavtp.training.telemetry import Telemetry

Hook = Callable[[int], None]
Momentum = Callable[[int], float]  # of the averaged weights, by step
Frozen = Callable[[int, dict], bool]  # whether a parameter group stands still in a step


class Trainer:
    """Runs a recipe from the newest checkpoint, or from the start, to ``train.steps``.

    Args:
        averaged: (average, trained) parameters of the EMA, such as teacher and student; empty where there is none.
        momentum: how slowly the average follows.
        make_loader: start step -> loader of this rank's share of the following steps.
        every: (interval in steps, hook) pairs; a hook is called on all ranks after each such step.
        frozen: parameter groups that a step leaves as they are.
        facts: JSON that is saved with every checkpoint.
        check: called with the checkpoint to go on from; raises UserError where it does not belong to this run.
    """

    def __init__(
        self, config: Config, engine: Engine, passes: list[Pass], averaged: list, momentum: Momentum,
        telemetry: Telemetry, make_loader: Callable[[int], Loader], every: list[tuple[int, Hook]], *,
        frozen: Frozen = lambda step, group: False, facts: Mapping[str, Any] = MappingProxyType({}),
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ):
        self.config = config
        self.engine = engine
        self.passes = passes
        self.averaged, self.momentum = averaged, momentum
        self.telemetry = telemetry
        self.make_loader = make_loader
        self.every = [(interval, hook) for interval, hook in every if interval > 0]
        self.frozen, self.facts, self.check = frozen, facts, check
        self.distillation = next((p for p in passes if isinstance(p, SelfDistillationPass)), None)
        token = broadcast_object(secrets.token_hex(8))
        self.store = CheckpointStore(checkpoint_root(config), config.train.keep_last, run_token=token)
        self.skipped_in_a_row, self.max_skipped = 0, float(config.train.max_skipped_steps)

    def resume(self, last: int | None = None) -> int:
        """Load the newest checkpoint that verifies, if ``train.resume`` allows; returns the first step to do.

        ``last``: there must be one, of this step or an earlier one.
        """
        if self.config.train.resume == "never":
            return 0
        root = checkpoint_root(self.config)
        found = broadcast_object(_outcome(lambda: _newest(root, last)) if self.engine.mesh.rank == 0 else None)
        if isinstance(found, UserError):
            raise found
        if found is None:
            return 0
        with open_checkpoint(found, verify="sizes") as checkpoint:  # rank 0 has checked the hashes
            self.check(checkpoint)
            # All have read it when the first goes on: tidying up may rename it.
            step = together(lambda: state.load(checkpoint, self.engine, self.distillation))
            changed = state.changed_data_keys(checkpoint, self.config)
        if changed:
            self.telemetry.event("data_changed", step=step, keys=changed)
        if self.engine.mesh.rank == 0 and last is None:
            self.store.tidy(found)
        self.telemetry.event("resumed", step=step, checkpoint=found.name)
        return step

    def run(self, start: int) -> bool:
        """Train to the end; False if a signal stopped the run early (its state is saved)."""
        steps, saved = self.config.train.steps, start
        signal = StopSignal(self.engine.device)
        phase.enter("loading the first batch", slow=True)
        loader = self.make_loader(start)
        stopped = False
        try:
            for batch in loader:
                done = batch.step + 1
                self._step(batch, loader)
                if self._due(self.config.train.checkpoint_every, done) and done < steps:
                    self.save(done)
                    saved = done
                for interval, hook in self.every:
                    if self._due(interval, done) and done < steps:
                        phase.enter(f"step {done}, pictures or evaluation", slow=True)
                        hook(done)
                if signal.agreed() and done < steps:
                    stopped = True
                    self.telemetry.event("stopped_by_signal", step=done)
                    break
                phase.enter(f"step {done + 1}, data")
            else:
                done = steps
            if saved < done:
                self.save(done)
            self.store.wait()
        finally:
            signal.close()
            loader.close()
        if stopped and self.engine.mesh.rank == 0:
            print(
                f"not finished: stopped after step {done} of {steps} ({signal.reason}), which is saved; start the same "
                "command again to go on", file=sys.stderr, flush=True,
            )
        return not stopped

    @staticmethod
    def _due(interval: int, done: int) -> bool:
        return interval > 0 and done % interval == 0

    def save(self, step: int) -> None:
        phase.enter(f"step {step}, checkpoint", slow=True)
        centers = self.distillation.centers if self.distillation else {}
        self.telemetry.event("checkpoint", step=step)  # first: a run that is killed goes on after it
        state.save(self.store, self.engine, self.config, step, centers, self.facts)

    def _step(self, batch: Batch, loader: Loader) -> None:
        terms, result = self.do_step(batch)
        self.telemetry.step(
            batch.step, terms, result.grad_norm, self.lr, loader.wait_seconds, tower_norms=result.tower_norms
        )

    def do_step(self, batch: Batch) -> tuple[dict[str, Tensor], StepResult]:
        """All passes and the update of one step; its terms, and what became of it."""
        self._set_lr(batch.step)
        self.engine.begin_step()
        terms: dict[str, Tensor] = {}
        centers = dict(self.distillation.centers) if self.distillation else {}
        for objective in self.passes:
            phase.enter(f"step {batch.step + 1}, pass {objective.name}")
            terms |= execute(objective, self.engine, batch)
        phase.enter(f"step {batch.step + 1}, update")
        result = self.engine.step()
        if result.applied:
            self.skipped_in_a_row = 0
            self.engine.lerp(self.averaged, 1 - self.momentum(batch.step))
        else:
            if self.distillation:
                self.distillation.centers = centers  # they have taken in this step's teacher outputs
            self._skipped(batch, terms)
        return terms, result

    def _set_lr(self, step: int) -> None:
        self.lr = learning_rate(step, self.config.train.steps, self.config.train.optimizer)
        self.engine.set_lr(lambda g: 0.0 if self.frozen(step, g) else self.lr * g["lr_scale"])

    def _skipped(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Something was not finite, and nothing updated. Name the terms that were not, on whichever ranks."""
        step, finite = batch.step + 1, torch.stack(list(terms.values())).isfinite().tolist()
        own = [name for name, is_finite in zip(terms, finite) if not is_finite]
        ranks = all_gather_object((own, batch.ids))
        bad = [name for name in terms if any(name in of_rank for of_rank, _ in ranks)]
        replica = self.engine.mesh.tp * self.engine.mesh.pp  # consecutive ranks, with the same share
        ids = [name for _, share in ranks[::replica] for name in share]
        self.telemetry.event("skipped", step=step, terms=bad or ["gradient"], replay=f"--replay {step}", ids=ids)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite gradient (last: step {step}, "
                f"{', '.join(bad) or 'all terms finite'}); nothing was updated: see where it comes from with "
                f"--replay {step}, lower train.optimizer.lr or use parallel.precision=fp32; more than "
                "train.max_skipped_steps is an error"
            )


def checkpoint_root(config: Config) -> Path:
    return Path(config.output_dir) / "checkpoints"


def _newest(root: Path, last: int | None) -> Path | None:
    """The newest checkpoint that verifies, None if there is none at all.

    Raises:
        UserError: there are some, all damaged: starting over would silently throw the run away. Or ``last`` is given,
            and there is none that is whole of this step or an earlier one.
    """
    found = find_latest(root, last=last)
    if found is None and last is not None:
        raise UserError(
            f"no checkpoint in {root} is whole and from before step {last + 1}: restore one from a copy, or go "
            "there from the first step with train.resume=never"
        )
    if found is None and has_checkpoints(root):
        raise UserError(
            f"no checkpoint in {root} is whole (each one's damage is logged above): restore one from a copy, or start "
            "over with train.resume=never"
        )
    return found


def _outcome(fn: Callable[[], Path | None]) -> Path | UserError | None:
    """The value, or the user's error as a value, so that every rank can be told."""
    try:
        return fn()
    except UserError as error:
        return error
