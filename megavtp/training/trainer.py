"""The training loop of every recipe on every layout: steps, telemetry, checkpoints, the end of a run."""

import secrets
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.reading import has_checkpoints
from megavtp.checkpoint.store import Checkpoint, CheckpointStore, find_latest, open_checkpoint
from megavtp.data.loader import Loader
from megavtp.errors import UserError
from megavtp.launch import phase
from megavtp.launch.stop_signal import StopSignal
from megavtp.parallel.collectives import all_gather_object, broadcast_object
from megavtp.parallel.engine import StepResult
from megavtp.parallel.looking import look_once
from megavtp.training import state
from megavtp.training.recipe import Recipe
from megavtp.training.schedules import learning_rate
from megavtp.training.step import train_step
from megavtp.training.telemetry import Telemetry

_DATA = "data_digest"  # in a checkpoint's metadata


class Trainer:
    """Runs a built recipe from the newest checkpoint, or from the start, to ``train.steps``."""

    def __init__(self, recipe: Recipe, telemetry: Telemetry):
        self.recipe, self.telemetry = recipe, telemetry
        self.config, self.engine = recipe.config, recipe.engine
        self.passes, self.averaged = recipe.passes(), recipe.averaged()
        self.data_digest = recipe.data_digest()
        self.hooks = [(interval, hook) for interval, hook in recipe.hooks(telemetry) if interval > 0]
        token = broadcast_object(secrets.token_hex(8))
        root = state.checkpoint_root(self.config)
        self.store = CheckpointStore(root, self.config.train.keep_last, run_token=token)
        self.skipped_in_a_row, self.max_skipped = 0, float(self.config.train.max_skipped_steps)

    def resume(self, last: int | None = None) -> int:
        """Load the newest checkpoint that verifies, if ``train.resume`` allows; return the first step to do.

        With ``last`` there must be one, of this step or an earlier one.
        """
        if self.config.train.resume == "never":
            return 0
        root = state.checkpoint_root(self.config)
        found = look_once(lambda: _newest(root, last))
        if found is None:
            return 0
        with found as checkpoint:
            self.recipe.check(checkpoint)
            step = state.load(checkpoint, self.engine, self.passes)
            self.recipe.resumed(checkpoint)
            changed = state.changed_keys(checkpoint, self.config, self.recipe.decides_data)
            if checkpoint.meta.get(_DATA, self.data_digest) != self.data_digest:
                changed.append("the shards in data.root")
            all_gather_object(None)  # all ranks have read it: only now may it be renamed, or pruned by another process
        if changed:
            self.telemetry.event("data_changed", step=step, keys=changed)
        if self.engine.mesh.rank == 0 and last is None:
            self.store.tidy(root / found.path.name)
        self.telemetry.event("resumed", step=step, checkpoint=found.path.name)
        return step

    def run(self, start: int) -> bool:
        """Train to the end; return False if a signal stopped the run early, whose state is then saved.

        Once the last step has begun, a signal stops nothing: the run has done its work and finishes, and says so.
        """
        steps, every = self.config.train.steps, self.config.train.checkpoint_every
        done = saved = start
        signal = StopSignal(self.engine.device)
        phase.enter("loading the first batch", slow=True)
        loader = self.recipe.loader(start)
        stopped = False
        try:
            for batch in loader:
                done = batch.step + 1
                self._step(batch, loader)
                if done == steps:
                    break
                if every and done % every == 0:
                    self.save(done)
                    saved = done
                for interval, hook in self.hooks:
                    if done % interval == 0:
                        phase.enter(f"step {done}, pictures or evaluation", slow=True)
                        hook(done)
                if stopped := signal.agreed():
                    self.telemetry.event("stopped_by_signal", step=done)
                    break
                phase.enter(f"step {done + 1}, data")
            if saved < done:
                self.save(done)
            self.store.wait()
        finally:
            signal.close()
            loader.close()
        told = ""
        if stopped:
            told = (
                f"not finished: stopped after step {done} of {steps} ({signal.told or 'another rank was told to'}), "
                "which is saved; start the same command again to go on"
            )
        elif signal.told:
            told = (
                f"told to stop ({signal.told}), but all {steps} steps are done and saved: the run finishes; another "
                "signal ends it at once"
            )
        if told and self.engine.mesh.rank == 0:
            print(told, file=sys.stderr, flush=True)
        return not stopped

    def save(self, step: int) -> None:
        phase.enter(f"step {step}, checkpoint", slow=True)
        self.telemetry.event("checkpoint", step=step)  # told first, as a run that is killed goes on after this line
        facts = {_DATA: self.data_digest, **self.recipe.facts()}
        state.save(self.store, self.engine, self.passes, self.config, step, facts)

    def _step(self, batch: Any, loader: Loader) -> None:
        terms, result = self.do_step(batch)
        self.telemetry.step(
            batch.step, terms, result.grad_norm, self.lr, loader.wait_seconds, tower_norms=result.tower_norms,
            bad_samples=len(loader.bad_samples),
        )

    def do_step(self, batch: Any) -> tuple[dict[str, Tensor], StepResult]:
        """Do one step, and report it if it was skipped."""
        step, optimizer = batch.step, self.config.train.optimizer
        self.lr = learning_rate(step, self.config.train.steps, optimizer)
        terms, result = train_step(
            self.engine, self.passes, batch, averaged=self.averaged, follow=self.recipe.follow(step),
            lr_of=lambda group: 0.0 if self.recipe.is_frozen(step, group) else self.lr * group["lr_scale"],
        )
        if result.applied:
            self.skipped_in_a_row = 0
        else:
            self._skipped(batch, terms)
        return terms, result

    def _skipped(self, batch: Any, terms: dict[str, Tensor]) -> None:
        """Report a step that was not finite and updated nothing, with the terms that were not finite on any rank."""
        step, finite = batch.step + 1, torch.stack(list(terms.values())).isfinite().tolist()
        own = [name for name, is_finite in zip(terms, finite) if not is_finite]
        ranks = all_gather_object((own, batch.ids))
        bad = [name for name in terms if any(name in of_rank for of_rank, _ in ranks)]
        replica = self.engine.mesh.tp * self.engine.mesh.pp  # so many consecutive ranks have the same share
        ids = [name for _, share in ranks[::replica] for name in share]
        self.telemetry.event("skipped", step=step, terms=bad or ["gradient"], replay=f"--replay {step}", ids=ids)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite (last: step {step}, "
                f"{', '.join(bad) or 'all terms finite'}); nothing was updated: see where it comes from with "
                f"--replay {step}, lower train.optimizer.lr or use parallel.precision=fp32; more than "
                "train.max_skipped_steps is an error"
            )


def _newest(root: Path, last: int | None) -> Checkpoint | None:
    """Open the newest checkpoint that verifies; None if there is none at all.

    Raises:
        UserError: all are damaged, and starting over would silently throw the run away. Or ``last`` is given, and no
            checkpoint of this step or an earlier one is whole.
    """
    found = find_latest(root, last=last)
    if found is None and (last is not None or has_checkpoints(root)):
        which, way = " (each one's damage is logged above)", "start over"
        if last is not None:
            which, way = f" and from before step {last + 1}", "go there from the first step"
        raise UserError(
            f"no checkpoint in {root} is whole{which}: restore one from a copy, or {way} with train.resume=never"
        )
    return None if found is None else open_checkpoint(found, verify="sizes")  # the hashes have been compared
