"""The folder of a run: one run at a time, nothing changed by a start that is refused, made anew if it is deleted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from folder_holder import held
from latent_folder import random_latents
from launched import Ranks, events, run, steps_done

from megavtp.config.schema import Config, TelemetryConfig
from megavtp.data import files, folder_lock
from megavtp.data.files import write_atomic
from megavtp.data.folder_lock import LOCK_FILE, FolderLock
from megavtp.dit.launcher import train_dit
from megavtp.errors import UserError
from megavtp.parallel.mesh import SINGLE
from megavtp.training import telemetry as telemetry_module
from megavtp.training.metrics_file import MetricsFile, read_metrics
from megavtp.training.output_dir import OutputDir
from megavtp.training.pictures import reconstruction_grid
from megavtp.training.telemetry import Telemetry
from megavtp.training.trainer import Trainer


def test_another_run_is_named_and_its_end_frees_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)
    with held(tmp_path) as pid:
        with pytest.raises(UserError, match=f"is in use by another run .host .*, pid {pid}, since 2") as told:
            FolderLock(tmp_path, "set another output_dir")
        assert str(told.value).startswith(str(tmp_path)) and "pytest" in str(told.value)
        assert str(told.value).endswith("or set another output_dir")
        os.kill(pid, signal.SIGKILL)  # not its child, which goes on
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        FolderLock(tmp_path, "").close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_just_ending_is_waited_for(tmp_path):
    with held(tmp_path, lives_on=0.5):
        FolderLock(tmp_path, "").close()


def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    FolderLock(tmp_path, "").close()
    assert caplog.text.count("no lock on this file system (No locks available)") == 1 and len(caplog.records) == 1


def impatient(rank: int) -> None:
    folder_lock._PATIENCE = 0.0


@pytest.mark.parametrize("world, entry", [(2, None), (1, train_dit)], ids=["pre-training", "DiT"])
def test_a_second_run_in_the_folder_is_refused_on_all_ranks(world, entry, recipe, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    if entry:
        dit = tmp_path / "dit.yaml"
        dit.write_text('{"model": {"width": 48, "depth": 1, "heads": 4}}')
        few = ["train.steps=1", "train.batch_size=8", "train.optimizer.warmup_steps=0", "data.streams=4"]
        command = ["--config", str(dit), f"data.root={random_latents(tmp_path / 'latents')}", *few]
    else:
        command = ["--config", recipe]
    with held(output) as pid:
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        with Ranks([*command, f"output_dir={output}"], world, tmp_path, impatient, entry) as ranks:
            assert ranks.wait() == [2] * world, ranks.output
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert len(ranks.errors) == world and all(f"pid {pid}" in line for line in ranks.errors), ranks.output


def config_of(folder: Path) -> Config:
    return Config(output_dir=str(folder / "run"), telemetry=TelemetryConfig(log_every=1))


def test_config_yaml_waits_for_the_start(tmp_path):
    with OutputDir(config_of(tmp_path), True) as output:
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
        output.begin()
        assert (tmp_path / "run" / "config.yaml").exists()
    with OutputDir(config_of(tmp_path), False) as other:  # of another rank
        other.begin()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def step(telemetry: Telemetry, number: int) -> None:
    telemetry.step(number - 1, {"a/loss": torch.tensor(1.0)}, torch.tensor(1.0), 0.1, 0.0)


def test_a_tracker_that_is_refused_drops_no_metrics(tmp_path, monkeypatch):
    def refuse(config, start):
        raise UserError("no key")

    monkeypatch.setattr(telemetry_module, "open_trackers", refuse)
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"kind": "step", "step": 7}\n')
    telemetry = Telemetry(config_of(tmp_path), SINGLE, 0.0)
    with pytest.raises(UserError, match="no key"):
        telemetry.start(0)
    assert [record["step"] for record in read_metrics(path)] == [7]


@pytest.mark.parametrize("lost", ["deleted", "moved", "metrics deleted"])
def test_a_folder_that_is_lost_is_made_anew(lost, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "run"
    with OutputDir(config_of(tmp_path), True) as output:
        telemetry = Telemetry(config_of(tmp_path), SINGLE, 0.0, output.keep)
        telemetry.start(0)
        output.begin()
        step(telemetry, 1)
        if lost == "deleted":
            shutil.rmtree(folder)
        elif lost == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            (folder / "metrics.jsonl").unlink()
        for number in (2, 3):
            step(telemetry, number)
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl", LOCK_FILE]
        assert sorted(steps_done(folder)) == [2, 3]
        assert caplog.text.count("was deleted or moved away") == (lost != "metrics deleted")
        monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)
        (folder / LOCK_FILE).unlink()
        with held(folder) as pid, pytest.raises(UserError, match=f"in use by another run .*pid {pid}"):
            step(telemetry, 4)
        telemetry.close()


def delete_folder(folder: Path, rank: int) -> None:
    """After the third step."""
    compute = Trainer._step

    def step(self, batch, loader):
        compute(self, batch, loader)
        if batch.step == 2 and rank == 0:
            self.store.wait()
            shutil.rmtree(folder)

    Trainer._step = step


def test_a_run_whose_folder_is_deleted_saves_its_state_there(recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}", "train.steps=5", "train.checkpoint_every=2"]
    ranks = run(command, 2, tmp_path, partial(delete_folder, output))
    assert [process.exitcode for process in ranks.processes] == [0, 0], ranks.output
    assert "Traceback" not in ranks.output and f"{output} was deleted or moved away" in ranks.output
    assert sorted(steps_done(output)) == [4, 5] and len(events(output, "checkpoint")) == 2
    assert os.readlink(output / "checkpoints" / "latest") == "step-00000005"
    assert {"config.yaml", "loss_curves.png"} <= {path.name for path in output.iterdir()}


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_line_that_the_disk_has_no_room_for_is_taken_back(tmp_path, monkeypatch):
    file, write = MetricsFile(tmp_path / "metrics.jsonl", 0), os.write
    file.append({"kind": "step", "step": 1})
    room = [10]

    def filling(descriptor, data):
        taken, room[0] = min(room[0], len(data)), max(0, room[0] - len(data))
        return write(descriptor, data[:taken]) if taken else full()

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .No space left on device.; free disk space"):
        file.append({"kind": "step", "step": 2})
    room[0] = 30  # enough for the next line in two parts
    monkeypatch.setattr(os, "write", lambda descriptor, data: filling(descriptor, data[:20]) if data else 0)
    file.append({"kind": "step", "step": 3})
    file.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.png", b"old")
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="a.png: cannot be written .No space left on device.; free disk space"):
        reconstruction_grid(images, images, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"
