"""How many processes a start without arguments becomes, and what --dry-run prints."""

from __future__ import annotations

import re
import sys

import psutil
import pytest
from launched import deepspeed, run, steps_done, succeed

from megavtp.errors import UserError
from megavtp.launch import two_on_a_cpu
from megavtp.training import launcher

LAUNCH = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=eyI", "launchers/pretrain.py"]
RUNNER = ["python", "/bin/deepspeed"]


class Parent:
    def __init__(self, command):
        self.command = command

    def cmdline(self):
        if self.command is None:
            raise psutil.AccessDenied()
        return self.command


@pytest.fixture
def decide(monkeypatch):
    """The decision for the commands above this process, its arguments and its environment."""

    def ask(*parents, arguments=(), world="1", gpu=False, launched=True):
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world, "CROSS_SIZE": "1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value) if launched else monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["launchers/pretrain.py", "--local_rank=0", *arguments])
        monkeypatch.setattr(two_on_a_cpu.torch.cuda, "is_available", lambda: gpu)
        process = type("Process", (), {"parents": lambda self: [Parent(command) for command in parents]})
        monkeypatch.setattr(two_on_a_cpu.psutil, "Process", process)
        return two_on_a_cpu.alone_on_a_cpu_without_being_told()

    return ask


def test_two_processes_unless_told_otherwise(decide):
    assert decide(LAUNCH, [*RUNNER, "launchers/pretrain.py"])
    assert decide(LAUNCH, [*RUNNER, "launchers/pretrain.py", "train.steps=3"], arguments=["train.steps=3"])
    assert decide(LAUNCH, None)  # another user's process
    for told in (["--num_accelerators", "1"], ["--num_gpus=1"], ["--include", "localhost:0"], ["--hostfile", "hosts"]):
        assert not decide(LAUNCH, [*RUNNER, *told, "launchers/pretrain.py"]), told
    assert not decide(LAUNCH, RUNNER, world="2")
    assert not decide(LAUNCH, RUNNER, gpu=True)
    assert not decide(LAUNCH, RUNNER, arguments=["--device=cpu"])
    assert not decide(["bash"], launched=False)


def test_the_deepspeed_launcher_alone_becomes_two_processes(recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}", "train.steps=2"]
    with deepspeed(None, command, tmp_path / "log") as launched:
        launched.wait_until_gone(240)
        assert launched.process.returncode == 0, launched.output
    assert "dist_world_size=2" in launched.output
    ports = re.findall(r"--master_port=(\d+)", launched.output)
    assert len(ports) == 2 and ports[0] == ports[1]  # of the first start and of its own
    assert sorted(steps_done(tmp_path / "run")) == [1, 2]


def test_a_dry_run_is_of_the_processes_that_a_run_would_have(recipe, tmp_path, monkeypatch):
    command = ["--config", recipe, "--dry-run"]
    with deepspeed(None, command, tmp_path / "log") as launched:
        launched.wait_until_gone(120)
    assert "layout     2 processes" in launched.output and "Traceback" not in launched.output, launched.output
    monkeypatch.setattr(two_on_a_cpu, "alone_on_a_cpu_without_being_told", lambda: True)  # as it was there
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *command, "data.streams=1"])
    with pytest.raises(UserError, match="data.streams = 1 is not"):
        launcher._main()


def test_dry_run_without_a_recipe_describes_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks = run(["--dry-run"], 2, tmp_path / "logs")
    assert [process.exitcode for process in ranks.processes] == [0, 0] and "Traceback" not in ranks.output
    for word in ("contrastive", "self_distillation", "reconstruction", "data/emoji", "runs/demo"):
        assert word in ranks.output
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]  # it wrote nothing


def _tell_what_the_engine_gets(rank):
    from megavtp.parallel import deepspeed_adapter as adapter

    inner = adapter.build_config

    def build_config(*arguments):
        config = inner(*arguments)
        print("engine", config["zero_optimization"]["sub_group_size"], config["steps_per_print"], flush=True)
        return config

    adapter.build_config = build_config


def test_a_deepspeed_file_reaches_the_engine(recipe, tmp_path):
    file = tmp_path / "deepspeed.json"
    command = ["--config", recipe, "--deepspeed_config", str(file), f"output_dir={tmp_path / 'run'}", "train.steps=1"]
    file.write_text('{"steps_per_print": 7, "zero_optimization": {"sub_group_size": 5000}}')
    succeed([*command, "deepspeed.steps_per_print=8"], 1, tmp_path / "logs", _tell_what_the_engine_gets)
    assert "engine 5000 8" in "".join(log.read_text() for log in (tmp_path / "logs").iterdir())
    assert list(steps_done(tmp_path / "run")) == [1]
    file.write_text('{"train_batch_size": 64}')
    ranks = run(command, 1, tmp_path / "refused")
    assert [process.exitcode for process in ranks.processes] == [2]
    assert "deepspeed.train_batch_size: is MegaVTP's to set" in ranks.errors[0]


def test_dry_run_on_many_ranks_speaks_once(recipe, tmp_path):
    ranks = run(["--config", recipe, "--dry-run", "parallel.tp=2"], 4, tmp_path)
    assert [process.exitcode for process in ranks.processes] == [0] * 4, ranks.output
    assert sum(bool(log.read_text()) for log in ranks.logs) == 1
