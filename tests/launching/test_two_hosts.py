"""A hostfile with two hosts: the doctor, a training, and the loss of a rank on the other host."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import two_hosts
from launched import ROOT, SCRIPT, records, wait_for

pytestmark = pytest.mark.multihost
DOCTOR = ROOT / "launchers" / "doctor.py"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := two_hosts.why_not():
        pytest.skip(reason)
    with two_hosts.TwoHosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def test_doctor_finds_what_is_not_shared(hosts, tmp_path):
    with hosts.launch(DOCTOR, ["--megabytes", "1", "--shared", str(hosts.private)], tmp_path / "log") as launched:
        launched.wait_until_gone(120)
        assert launched.process.returncode == 1
    output = launched.output
    assert "started by deepspeed, ranks: 2, machines: 2, meeting at 10.213.7.1:29500" in output, output
    assert "host-b: rank 1, CPU, 10.213.7.2" in output
    for line in ("ok     versions", "ok     clocks", "ok     ports", "WRONG  shared storage"):
        assert line in output, output
    assert f"1. {hosts.private} is not the same folder on host-a and host-b: checkpoints and data must be" in output
    assert "  0 (host-a) - 1 (host-b): " in output  # their bandwidth
    assert "1 thing wrong:" in output and "Traceback" not in output


def test_a_rank_killed_on_the_other_host_ends_the_training(hosts, recipe, tmp_path):
    output = tmp_path / "run"
    command = ["--config", recipe, f"output_dir={output}", "train.steps=5000", "data.workers=1"]
    with hosts.launch(SCRIPT, command, tmp_path / "log", port=29501) as launched:
        # A rank says every second where it is: the last report of the killed one is to be of a step.
        wait_for(lambda: seconds_of_steps(output) > 5, 120, lambda: launched.output)
        os.kill(rank_process(hosts, "1"), signal.SIGKILL)
        launched.wait_until_gone(60)
        assert launched.process.returncode != 0
    assert "[rank 0] ended because other ranks did: rank 1 (host-b): no sign of life: killed" in launched.output
    assert "last seen in step" in launched.output


def seconds_of_steps(output: Path) -> float:
    times = [record["time"] for record in records(output) if record["kind"] == "step"]
    return max(times, default=0.0) - min(times, default=0.0)


def rank_process(hosts: two_hosts.TwoHosts, rank: str) -> int:
    found = []
    for pid in hosts.processes():
        process = psutil.Process(pid)
        if str(SCRIPT) in process.cmdline()[:4] and process.environ().get("RANK") == rank:
            found.append(process)
    return next(p.pid for p in found if p.ppid() not in {q.pid for q in found})  # not a loader worker


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(two_hosts, "_find", lambda name: None if name == "sshd" else Path("/bin") / name)
    assert two_hosts.why_not() == "needs sshd (Debian: openssh-server, pdsh, iproute2)"
