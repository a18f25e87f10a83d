"""Runs that are told to stop, or lose a rank: the state is saved, every process ends, the next start goes on."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
from launched import Ranks, deepspeed, events, steps_done, succeed, torchrun, wait_for

from megavtp.launch import stop_signal
from megavtp.launch.ranks import STOPPED

pytestmark = pytest.mark.timeout(900)  # seconds of work, on an idle machine
LONG = ["train.steps=5000", "train.checkpoint_every=0"]  # it would take minutes


def wait_for_step(output, step, ranks):
    wait_for(lambda: max(steps_done(output), default=0) >= step, 240, lambda: ranks.output)


def check_saved(output) -> int:
    """The run stopped after a step and saved it; returns the step."""
    (stopped,), (saved,) = events(output, "stopped_by_signal"), events(output, "checkpoint")
    assert stopped["step"] == saved["step"] == max(steps_done(output))
    assert (output / "checkpoints" / "latest").resolve().name == f"step-{saved['step']:08d}"
    return saved["step"]


def check_goes_on(recipe, output, folder, step) -> None:
    with Ranks(["--config", recipe, f"output_dir={output}", *LONG], 1, folder) as ranks:
        wait_for_step(output, step + 1, ranks)
        ranks.kill()
    assert events(output, "resumed")[-1]["step"] == step
    assert sorted(steps_done(output)) == list(range(1, max(steps_done(output)) + 1))


@pytest.mark.parametrize(
    "start, stop, goes_on",
    [
        (deepspeed, lambda command: os.kill(command.pid, signal.SIGHUP), True),
        (deepspeed, lambda command: os.killpg(command.pid, signal.SIGINT), False),
        (torchrun, lambda command: os.kill(command.pid, signal.SIGTERM), True),
    ],
    ids=["SIGHUP to deepspeed alone", "Ctrl-C in the terminal of deepspeed", "SIGTERM to torchrun"],
)
def test_a_launcher_is_told_to_stop(start, stop, goes_on, recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}", "data.workers=1", *LONG]
    with start(2, command, tmp_path / "log") as launched:
        wait_for_step(output, 2, launched)
        assert len(launched.alive()) >= 5  # the launcher, two ranks with a loader worker each
        stop(launched.process)
        launched.wait_until_gone(120)
        # The launcher's own status: which one depends on whether it or its child ends first, see StopSignal.
        assert launched.process.returncode != 0
        step = check_saved(output)
        assert launched.output.count(f"not finished: stopped after step {step} of 5000 (") == 1
    if goes_on:  # the others show it; this saves some seconds
        check_goes_on(recipe, output, tmp_path, step)


def test_one_rank_is_told_and_all_stop(recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}"]
    with Ranks([*command, *LONG], 2, tmp_path) as ranks:
        wait_for_step(output, 2, ranks)
        os.kill(ranks.processes[1].pid, signal.SIGHUP)  # as SIGTERM
        assert ranks.wait(120) == [STOPPED] * 2, ranks.output
    step = check_saved(output)
    assert f"not finished: stopped after step {step} of 5000 (another rank was told to), which is saved" in ranks.output
    assert not list(events(output, "finished"))
    succeed([*command, f"train.steps={step + 1}"], 2, tmp_path)  # and a finished run ends with 0
    assert [event["step"] for event in events(output, "finished")] == [step + 1]


def _loses_its_launcher_and_reader(rank: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    stop_signal._CHAIN.append((psutil.Process(), os.getpid()))  # no process is its own parent


def test_a_killed_launcher_which_may_end_with_0_is_told_and_closed_output_is_no_reason_to_stop(recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}", "data.workers=1", *LONG]
    with Ranks(command, 1, tmp_path, _loses_its_launcher_and_reader) as ranks:
        assert ranks.wait(120) == [STOPPED], ranks.output
    step = check_saved(output)
    told = f"not finished: stopped after step {step} of 5000 (the launcher has gone), which is saved; start the same "
    assert ranks.output.count(told) == 1 and "Traceback" not in ranks.output, ranks.output


def test_a_rank_that_is_killed_ends_the_others(recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}", "data.workers=1", *LONG]
    with deepspeed(2, command, tmp_path / "log") as launched:
        wait_for_step(output, 2, launched)
        victim = next(p for p in launched.ranks() if p.environ()["RANK"] == "1" and is_rank(p, launched))
        victim.kill()
        launched.wait_until_gone(120)
        assert launched.process.returncode not in (0, 2)
        assert "[rank 0] ended because other ranks did" in launched.output
        assert "Traceback" not in launched.output


def is_rank(process: psutil.Process, launched) -> bool:
    """Not a loader worker, which is a copy of its rank."""
    return process.ppid() not in {rank.pid for rank in launched.ranks()}
