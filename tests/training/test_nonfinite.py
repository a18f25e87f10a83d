"""Steps with a term or gradient that is not finite change nothing, on any rank and at any ZeRO stage, and are named."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from launched import Ranks, events, run, steps_done, succeed

from megavtp.pretraining.passes import ReconstructionPass
from megavtp.training.trainer import Trainer

SHORT = ["train.checkpoint_every=0", "objectives.self_distillation.centering=softmax"]
LEFT_OUT = range(1, 4)  # indices of the steps


def nan_pictures(trainer: Trainer, batch):
    """Of the last data-parallel rank."""
    mesh = trainer.engine.mesh
    return _nan(batch) if mesh.dp_rank == mesh.dp - 1 else batch


def nan_target(trainer: Trainer, batch):
    """On one replica's last stage, which reads no pixels but the targets: a NaN that no gradient shows, as L1 has slope
    0 there."""
    mesh = trainer.engine.mesh
    return _nan(batch) if mesh.is_last_stage and mesh.dp_rank == 0 else batch


@contextmanager
def nan_term(trainer: Trainer, weight: float, change):
    """L1 has this ``weight``, and on one rank its value is changed."""
    mesh = trainer.engine.mesh
    (objective,) = (x for x in trainer.passes if isinstance(x, ReconstructionPass))
    compute, before = objective.local_terms, objective.term_weights
    chosen = mesh.is_last_stage and mesh.tp_rank == mesh.tp - 1 and mesh.dp_rank == 0

    def local_terms(outputs, micro):
        terms = compute(outputs, micro)
        return {"l1": change(terms["l1"])} if chosen else terms

    objective.local_terms, objective.term_weights = local_terms, {"l1": weight}
    yield
    objective.local_terms, objective.term_weights = compute, before


def nan_where_nothing_weighs(trainer: Trainer):
    return nan_term(trainer, 0.0, lambda value: value + torch.nan)  # the gradient stays zero


def nan_on_one_rank(trainer: Trainer):
    return nan_term(trainer, 1.0, lambda value: value * torch.nan)


def poison(how: dict, rank: int) -> None:
    """Spoil steps, ``how`` by index: the batch, or what is done with it. Nothing may move on any rank then."""
    compute = Trainer._step

    def step(self, batch, loader):
        if batch.step not in how:
            return compute(self, batch, loader)
        before = _everything(self)
        if how[batch.step] in (nan_pictures, nan_target):
            compute(self, how[batch.step](self, batch), loader)
        else:
            with how[batch.step](self):
                compute(self, batch, loader)
        after = _everything(self)
        assert before.keys() == after.keys()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert not moved, f"moved in step {batch.step}: {moved[:3]}"

    Trainer._step = step


def leave_out(steps: range, rank: int) -> None:
    compute = Trainer._step
    Trainer._step = lambda self, batch, loader: batch.step in steps or compute(self, batch, loader)


def _nan(batch):
    images, crops = (torch.full(x.shape, torch.nan) for x in (batch.images, batch.global_crops))
    return replace(batch, images=images, global_crops=crops)


def _everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, moments, teacher, centres and Adam's step count."""
    found = {name: value.clone() for name, value in trainer.engine.export(wanted=lambda number: True).items()}
    found |= {name: value.clone() for objective in trainer.passes for name, value in objective.state().items()}
    return found | {"steps": torch.tensor(trainer.engine.optimizer_steps)}


@pytest.fixture(scope="module")
def without_the_steps(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    command = ["--config", recipe, f"output_dir={folder / 'run'}", "train.steps=6", *SHORT]
    succeed(command, 1, folder, partial(leave_out, LEFT_OUT))
    return steps_done(folder / "run")


@pytest.mark.parametrize(
    "zero, world, layout", [
        (0, 2, "parallel.pp=2"), (1, 2, "parallel.tp=2"), (2, 2, ""), (3, 4, "parallel.pp=2"),
        (1, 2, "parallel.tp=2 parallel.precision=bf16"),
    ],
)
def test_spoilt_steps_are_skipped(zero, world, layout, without_the_steps, recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}", "train.steps=6", *SHORT, *layout.split()]
    pp = "parallel.pp=2" in layout
    how = dict(zip(LEFT_OUT, (nan_pictures, nan_where_nothing_weighs, nan_target if pp else nan_on_one_rank)))
    succeed([*command, f"parallel.zero_stage={zero}"], world, tmp_path, partial(poison, how))
    skipped = events(output, "skipped")
    assert [(event["step"], event["replay"]) for event in skipped] == [(n + 1, f"--replay {n + 1}") for n in LEFT_OUT]
    assert {"contrastive/loss", "reconstruction/l1", "self_distillation/ibot"} <= set(skipped[0]["terms"])
    assert skipped[1]["terms"] == skipped[2]["terms"] == ["reconstruction/l1"]
    for event in skipped:
        assert len(event["ids"]) == 16 and all(name.startswith("shard-") for name in event["ids"])
    if "bf16" in layout:
        return
    found = steps_done(output)
    for step in (5, 6):  # as if the spoilt steps had never been
        assert found[step]["terms"] == pytest.approx(without_the_steps[step]["terms"], rel=1e-5, abs=1e-5)
        assert found[step]["grad_norm"] == pytest.approx(without_the_steps[step]["grad_norm"], rel=1e-4)


def test_too_many_skipped_steps_are_an_error(recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}", "train.steps=4", *SHORT]
    how = dict.fromkeys(range(4), nan_pictures)
    ranks: Ranks = run([*command, "train.max_skipped_steps=2"], 2, tmp_path, partial(poison, how))
    assert [process.exitcode for process in ranks.processes] == [2, 2], ranks.output
    assert len(ranks.errors) == 2 and "Traceback" not in ranks.output
    skipped = events(tmp_path / "run", "skipped")
    assert len(skipped) == 3 and skipped[-1]["step"] == 3
    told = "3 steps in a row had a loss or gradient that is not finite (last: step 3"
    assert all(told in line for line in ranks.errors)
