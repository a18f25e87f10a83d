"""A DiT's run by its launcher: trained, stopped half-way, resumed on another layout; what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from latent_folder import random_latents
from launched import Ranks, events, steps_done

from megavtp.checkpoint.store import find_latest, open_checkpoint
from megavtp.config.load import from_dict
from megavtp.dit.checkpoint import check_goes_on, load_dit
from megavtp.dit.config import DiTConfig
from megavtp.dit.launcher import train_dit
from megavtp.errors import UserError
from megavtp.latents.folder import LatentFolder

STEPS = 6
RECIPE = {
    "seed": 5, "ema_momentum": 0.8, "model": {"width": 48, "depth": 3, "heads": 4},
    "data": {"streams": 4, "workers": 0, "shuffle_block": 4}, "parallel": {"precision": "fp32"},
    "train": {
        "steps": STEPS, "batch_size": 8, "checkpoint_every": 2,
        "optimizer": {"lr": 1e-2, "min_lr": 1e-2, "warmup_steps": 0, "eps": 1e-3},
    },
    "telemetry": {"log_every": 1},
}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return random_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def recipe(root, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "dit_tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "root": str(root)}}))
    return path


def start(recipe: Path, folder: Path, world: int, *overrides: str) -> Ranks:
    arguments = ["--config", str(recipe), f"output_dir={folder / 'run'}", *overrides]
    ranks = Ranks(arguments, world, folder, entry=train_dit)
    ranks.wait()
    return ranks


def statuses(ranks: Ranks) -> set[int]:
    return {process.exitcode for process in ranks.processes}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A run on one process, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    ranks = start(recipe, folder, 1, "parallel.zero_stage=0")
    assert statuses(ranks) == {0}, ranks.output
    return folder / "run"


def test_replay_from_the_start(whole, recipe):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    ranks = start(recipe, whole.parent, 1, "parallel.zero_stage=0", "train.resume=never", "--replay", "2")
    assert statuses(ranks) == {0}, ranks.output
    (line,) = (line for line in ranks.output.splitlines() if line.startswith("step 2: flow_matching/mse "))
    assert float(line.split()[-1]) == pytest.approx(steps_done(whole)[2]["terms"]["flow_matching/mse"], rel=1e-7)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_resumed_on_another_layout(whole, recipe, tmp_path):
    for world, overrides in (
        (2, ("parallel.tp=2", "parallel.zero_stage=3", "train.steps=3")),
        (2, ("parallel.pp=2", "parallel.zero_stage=1", "flow_matching.micro_batch=4")),
    ):
        ranks = start(recipe, tmp_path, world, *overrides)
        assert statuses(ranks) == {0}, ranks.output
    run = tmp_path / "run"
    assert [event["step"] for event in events(run, "resumed")] == [3]
    assert not events(run, "data_changed")
    expected, found = steps_done(whole), steps_done(run)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert set(values["terms"]) == {"flow_matching/mse", "flow_matching/cosine"}
        assert found[step]["terms"] == pytest.approx(values["terms"], rel=1e-5)
        assert found[step]["tower_grad_norms"] == pytest.approx({"dit": values["grad_norm"]}, rel=1e-4)
    for average in (True, False):
        models = [load_dit(folder / "checkpoints" / "latest", average=average) for folder in (whole, run)]
        for (name, a), (_, b) in zip(*(stored.model.named_parameters() for stored in models)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert models[0].artifact == models[1].artifact and models[0].step == STEPS
    assert (run / "config.yaml").exists() and (run / "loss_curves.png").exists()


def test_the_average_is_that_of_all_steps(whole):
    average = {}
    folder = whole / "checkpoints"
    with open_checkpoint(find_latest(folder)) as last:
        names = [name.removeprefix("model/ema.") for name in last.names if name.startswith("model/ema.")]
        average = {name: last.tensor(f"model/ema.{name}") for name in names}
        trained = {name: last.tensor(f"model/dit.{name}") for name in names}
        assert {name.split("/")[0] for name in last.names} == {"model", "exp_avg", "exp_avg_sq"}
    with open_checkpoint(folder / f"step-{STEPS - 2:08d}") as before:
        older = {name: before.tensor(f"model/ema.{name}") for name in names}
    # Between two checkpoints lie two steps: the average is 0.64 of the older one plus 0.2 and 0.16 of the weights.
    for name, value in average.items():
        middle = (value - 0.64 * older[name] - 0.2 * trained[name]) / 0.16
        bound = 3e-2  # a step of Adam moves a weight by 0.01 at most, times a little at the start
        assert (middle - trained[name]).abs().max() < bound, name


def refused(ranks: Ranks, message: str) -> None:
    assert statuses(ranks) == {2}, ranks.output
    assert len(ranks.errors) == len(ranks.processes) and "Traceback" not in ranks.output
    assert all(message in line for line in ranks.errors), ranks.errors


def test_latents_of_another_tokenizer_or_of_other_statistics_are_refused(whole, recipe, tmp_path):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    other = random_latents(tmp_path / "other", fingerprint="cd" * 32)
    refused(start(recipe, tmp_path, 1, f"data.root={other}", "train.steps=7"), "different tokenizers")
    scaled = random_latents(tmp_path / "scaled", std=2.0)
    refused(start(recipe, tmp_path, 1, f"data.root={scaled}", "train.steps=7"), "different latent statistics")


def test_what_no_shape_shows_is_compared(whole, root, recipe, tmp_path):
    """Weights would be taken for others, or passed over; labels for other classes."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    refused(start(recipe, tmp_path, 1, "model.heads=2", "train.steps=7"), "has model.heads = 4, this run 2")
    folder, named, permuted = LatentFolder(root), tmp_path / "named", tmp_path / "permuted"
    for path, names in ((named, "abc"), (permuted, "bac")):
        shutil.copytree(root, path)
        (path / "classes.json").write_text(json.dumps(list(names)))
    with open_checkpoint(find_latest(whole / "checkpoints")) as checkpoint:
        model = from_dict(checkpoint.meta["config"], DiTConfig).model
        check_goes_on(checkpoint, replace(model, size="b"), folder)
        for change in ({"depth": 2}, {"qk_norm": True}, {"num_classes": 4}, {"patch_size": 2}):
            (name,) = change
            with pytest.raises(UserError, match=f"has model.{name} = .*set model.{name}={getattr(model, name)}"):
                check_goes_on(checkpoint, replace(model, **change), folder)
        check_goes_on(checkpoint, model, LatentFolder(named))  # it had none to compare
        checkpoint.meta["dit"]["classes"] = list("abc")
        check_goes_on(checkpoint, model, LatentFolder(named))
        for other, found in ((LatentFolder(permuted), "b, a, c"), (folder, "numbers without names")):
            with pytest.raises(UserError, match=rf"other classes \(a, b, c\) than those of .*\({found}\)"):
                check_goes_on(checkpoint, model, other)


def test_classes_that_no_latents_have_are_told(whole, recipe, tmp_path):
    ranks = start(recipe, tmp_path, 1, "model.num_classes=9", "train.steps=1")
    assert statuses(ranks) == {0}, ranks.output
    (told,) = events(tmp_path / "run", "untrained_classes")
    assert "model.num_classes = 9, but the labels in" in told["note"] and "are of 3" in told["note"]
    assert not events(whole, "untrained_classes")


def test_errors_and_the_dry_run_need_no_data(recipe, tmp_path):
    missing = f"data.root={tmp_path / 'missing'}"
    refused(start(recipe, tmp_path, 2, missing), "no such folder of latents")
    ranks = start(recipe, tmp_path, 2, missing, "--dry-run", "parallel.tp=2")
    assert statuses(ranks) == {0} and ranks.output.count("DiT-xl") == 1 and "tp 2 x pp 1 x dp 1" in ranks.output
    refused(start(recipe, tmp_path, 1, "model.head=3"), "did you mean model.heads?")
