"""A rank that raises, is killed or hangs ends all, within seconds, with its name and place; no process is left."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import faulty
import pytest
from distributed import free_port
from launched import Launched, Ranks

from megavtp.launch import ranks
from megavtp.launch.ranks import STOPPED
from megavtp.pretraining import passes

TIMEOUT = 5.0  # seconds that a phase may take in these runs
# kind, seconds until all have ended, what the others say of rank 1 (of 3, in step 3's second pass).
CASES = {
    "raises": (10, "in step 3, pass reconstruction failed, ValueError: made up"),
    "user error": (10, "in step 3, pass reconstruction met an error: the disk of this machine is full"),
    "is killed": (20, "no sign of life: killed (out of memory?), crashed, stuck in C code, or the machine is lost; "
                      "last seen in step 3, pass reconstruction"),
    "hangs": (TIMEOUT + 10, "hangs: no progress for"),
    "hangs in C": (TIMEOUT + 20, "no sign of life"),
}
STATUS = {"user error": 2, "is killed": -9}


def seconds_since_fault(output: str) -> float:
    return time.time() - float(re.search(r"at (\d+\.\d+)", output)[1])


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "hangs"])  # that is below, twice
def test_one_rank_ends_all(kind, tmp_path):
    limit, text = CASES[kind]
    with Ranks([], 3, tmp_path, partial(faulty.run, kind, 1, TIMEOUT)) as ranks:
        statuses = ranks.wait(120)
        assert seconds_since_fault(ranks.output) < limit
    assert statuses == [1, STATUS.get(kind, 1), 1], ranks.output
    logs = [log.read_text() for log in ranks.logs]
    for rank in (0, 2):
        assert re.search(rf"\[rank {rank}\] ended because other ranks did: rank 1 \(\S+\):? ", logs[rank]), logs[rank]
        assert text in logs[rank] and "Traceback" not in logs[rank]
    if kind == "raises":
        assert "[rank 1] failed in step 3, pass reconstruction:\nTraceback" in logs[1]
    if kind == "hangs in C":  # its own stack, on its own stderr
        assert "faulty.py" in logs[1] and "in main" in logs[1]


def test_rank_0_is_killed_to_which_all_listen(tmp_path):
    with Ranks([], 2, tmp_path, partial(faulty.run, "is killed", 0, TIMEOUT)) as ranks:
        statuses = ranks.wait(120)
        assert seconds_since_fault(ranks.output) < CASES["is killed"][0]
    assert statuses == [-9, 1], ranks.output
    told = r"\[rank 1\] ended because other ranks did: rank 0 \(\S+\): no sign of life: killed"
    assert re.search(told, ranks.output), ranks.output


def test_a_machine_with_rank_0_that_is_lost_without_a_word(tmp_path):
    """Its connections stay open, and nothing answers."""
    with Ranks([], 2, tmp_path, partial(faulty.run, "is suspended", 0, TIMEOUT)) as ranks:
        ranks.processes[1].join(60)
        assert ranks.processes[1].exitcode == 1
        assert seconds_since_fault(ranks.output) < TIMEOUT + 15
    assert re.search(r"\[rank 1\] ended because other ranks did: rank 0 \(\S+\): no sign of life", ranks.output)


def _is_killed_before_it_joins(rank: int) -> None:
    """On rank 1, once all have met. Nobody has heard of it again, and no launcher ends the others."""
    if rank == 1:
        ranks.import_deepspeed = lambda: os.kill(os.getpid(), signal.SIGKILL)
    faulty.run("", -1, 1.0)


def test_a_rank_that_is_killed_before_it_joins_ends_all(tmp_path):
    with Ranks([], 2, tmp_path, _is_killed_before_it_joins) as ranks:
        assert ranks.wait(30) == [1, -9], ranks.output  # a minute more is what the process group would wait
    told = r"\[rank 0\] ended because other ranks did: rank 1 \(\S+\):? (no sign of life|hangs)"
    assert re.search(told, ranks.output), ranks.output


def test_a_single_process_is_watched_too(tmp_path):
    with Ranks([], 1, tmp_path, partial(faulty.run, "hangs", 0, 1.0)) as ranks:
        assert ranks.wait(30) == [1], ranks.output
    told = r"\[rank 0\] rank 0 \(\S+\) hangs: no progress for \d s \(limit: parallel.timeout = 1 s\), in step 3, pass "
    assert re.search(told, ranks.output) and "Traceback" not in ranks.output, ranks.output


@pytest.mark.parametrize("kind", ["raises", "is killed", "hangs"])
def test_under_the_deepspeed_launcher(kind, tmp_path):
    runner = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port())]
    command = [sys.executable, *runner, str(Path(faulty.__file__)), kind, "1", str(TIMEOUT)]
    with Launched(command, tmp_path / "log", PYTHONPATH=":".join(sys.path)) as launched:
        launched.wait_until_gone(120)
        # Its launcher looks once a second, and then ends itself. The process group would wait for a minute and more.
        assert seconds_since_fault(launched.output) < CASES[kind][0] + 15
        assert launched.process.returncode not in (0, STOPPED)
    assert re.search(r"\[rank 0\] ended because other ranks did: rank 1 \(", launched.output), launched.output
    assert CASES[kind][1] in launched.output


def _reconstruction_hangs(rank: int) -> None:
    """On rank 1, in the third step."""
    if rank == 1:
        inputs = passes.ReconstructionPass.inputs

        def hang(self, micro, first):
            if self.batch.step == 2:
                time.sleep(600)
            return inputs(self, micro, first)

        passes.ReconstructionPass.inputs = hang


def test_a_training_says_which_pass_hangs(recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}", "train.steps=5000", "parallel.timeout=6"]
    with Ranks(command, 2, tmp_path, _reconstruction_hangs) as ranks:
        assert ranks.wait(120) == [1, 1], ranks.output
    first, second = (log.read_text() for log in ranks.logs)
    told = r"rank 1 \(\S+\) hangs: no progress for [67] s \(limit: parallel.timeout = 6 s\), "
    told += r"in step 3, pass reconstruction at pipeline.py:\d+ in "
    assert re.search(r"\[rank 0\] ended because other ranks did: " + told, first), first
    assert re.search(r"\[rank 1\] " + told, second) and "in hang" in second  # of the stack
