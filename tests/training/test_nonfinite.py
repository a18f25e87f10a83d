"""Steps whose gradient is not finite change nothing, on any rank and at any ZeRO stage, and are named."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from launched import Ranks, events, run, steps_done, succeed

from megavtp.training.trainer import Trainer

POISONED = 1  # index of the step
SHORT = ["train.steps=4", "train.checkpoint_every=0", "objectives.self_distillation.centering=softmax"]


def poison(steps: range, rank: int) -> None:
    """Make the pictures of rank 1 NaN in these steps, and see to it that nothing moves on any rank."""
    compute = Trainer._step

    def step(self, batch, loader):
        if batch.step not in steps:
            return compute(self, batch, loader)
        if rank == 1:
            batch = replace(batch, images=torch.full(batch.images.shape, torch.nan), global_crops=_nan(batch))
        before = _everything(self)
        compute(self, batch, loader)
        after = _everything(self)
        assert before.keys() == after.keys()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert not moved, f"moved: {moved}"

    Trainer._step = step


def leave_out(steps: range, rank: int) -> None:
    compute = Trainer._step
    Trainer._step = lambda self, batch, loader: batch.step in steps or compute(self, batch, loader)


def _nan(batch) -> torch.Tensor:
    return torch.full(batch.global_crops.shape, torch.nan)


def _everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, moments, teacher, centres and Adam's step count."""
    found = {name: value.clone() for name, value in trainer.engine.export(wanted=lambda number: True).items()}
    found |= {f"center/{name}": value.clone() for name, value in trainer.distillation.centers.items()}
    return found | {"steps": torch.tensor(trainer.engine.optimizer_steps)}


@pytest.fixture(scope="module")
def without_the_step(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    hook = partial(leave_out, range(POISONED, POISONED + 1))
    succeed(["--config", recipe, f"output_dir={folder / 'run'}", *SHORT], 1, folder, hook)
    return steps_done(folder / "run")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_poisoned_batch_is_skipped(zero, without_the_step, recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}", *SHORT, f"parallel.zero_stage={zero}"]
    succeed(command, 2, tmp_path, partial(poison, range(POISONED, POISONED + 1)))
    (skipped,) = events(output, "skipped")
    assert skipped["step"] == POISONED + 1
    assert {"contrastive/loss", "reconstruction/l1", "self_distillation/ibot"} <= set(skipped["terms"])
    assert len(skipped["ids"]) == 16 and all(name.startswith("shard-") for name in skipped["ids"])
    found = steps_done(output)
    for step in (3, 4):  # as if the poisoned batch had never been
        assert found[step]["terms"] == pytest.approx(without_the_step[step]["terms"], rel=1e-5, abs=1e-5)
        assert found[step]["grad_norm"] == pytest.approx(without_the_step[step]["grad_norm"], rel=1e-4)


def test_too_many_skipped_steps_are_an_error(recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}", *SHORT, "train.max_skipped_steps=2"]
    ranks: Ranks = run(command, 2, tmp_path, partial(poison, range(4)))
    assert [process.exitcode for process in ranks.processes] == [2, 2], ranks.output
    assert len(ranks.errors) == 2 and "Traceback" not in ranks.output
    assert all("3 steps in a row had a non-finite gradient" in line for line in ranks.errors)
    skipped = events(tmp_path / "run", "skipped")
    assert len(skipped) == 3 and all(f"last: step {skipped[-1]['step']}, " in line for line in ranks.errors)
