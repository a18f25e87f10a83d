"""Run launchers and tools in tests: their ranks as plain processes, or under a real launcher."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from distributed import free_port

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launchers" / "pretrain.py"
Hook = Callable[[int], None]
KEYS = ("terms", "grad_norm", "tower_grad_norms", "lr")  # of a step's line, that do not depend on time

_context = multiprocessing.get_context("forkserver")  # `distributed` says what is preloaded


class Ranks:
    """The ranks of one start of the launcher, one process each, with what they printed.

    ``arguments``: of the launcher. ``hook``: top-level function, called as hook(rank) in each rank before it starts, to
    observe it or to make it fail. ``entry``: what the launcher calls, ``pretrain`` if not given.
    """

    def __init__(
        self, arguments: list[str], world: int, folder: Path, hook: Hook | None = None,
        entry: Callable[[], None] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{uuid.uuid4().hex[:8]}-rank{rank}.log" for rank in range(world)]
        port = free_port()
        self.processes = [
            _context.Process(target=_rank, args=(rank, world, port, arguments, self.logs[rank], hook, entry))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As kill -9 would, all at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout: float = 240) -> list[int]:
        """Every rank's exit status; fails, and kills, if one has not ended in time."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not hanging, f"ranks {hanging} did not end within {timeout} s\n{self.output}"
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    @property
    def errors(self) -> list[str]:
        """The lines that tell of an error, and the first line of anything that looks like a traceback."""
        return [line for line in self.output.splitlines() if "error: " in line or "Traceback" in line]


def _end_with_parent() -> None:
    """Tests that are killed leave nobody behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _rank(
    rank: int, world: int, port: int, arguments: list[str], log: Path, hook: Hook | None,
    entry: Callable[[], None] | None,
) -> None:
    _end_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )
    sys.argv = [str(SCRIPT), *arguments]
    import torch

    torch.set_num_threads(1)
    from megavtp.pretraining.launcher import pretrain

    if hook is not None:
        hook(rank)
    (entry or pretrain)()


def run(
    arguments: list[str], world: int, folder: Path, hook: Hook | None = None, timeout: float = 240,
    entry: Callable[[], None] | None = None,
) -> Ranks:
    """A finished start; its statuses are in ``ranks.processes``."""
    ranks = Ranks(arguments, world, folder, hook, entry)
    ranks.wait(timeout)
    return ranks


def succeed(
    arguments: list[str], world: int, folder: Path, hook: Hook | None = None, entry: Callable[[], None] | None = None
) -> None:
    with Ranks(arguments, world, folder, hook, entry) as ranks:
        statuses = ranks.wait()
        assert statuses == [0] * world, ranks.output


class Launched:
    """A command in a session of its own. Its processes are known by a variable that all descendants inherit."""

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.mark = uuid.uuid4().hex
        self.log = log
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **environment, "MEGAVTP_TEST": self.mark}, cwd=log.parent,
                preexec_fn=_end_with_parent,
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def alive(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _marked(process, self.mark)]

    def ranks(self) -> list[psutil.Process]:
        """The processes that a launcher started with a rank."""
        return [p for p in self.alive() if "RANK" in _environment(p) and str(SCRIPT) in p.cmdline()[:4]]

    def wait_until_gone(self, timeout: float) -> None:
        """All descendants have ended, not only the command."""
        wait_for(lambda: not self.alive(), timeout, lambda: f"{self.alive()}\n{self.output}")
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


def deepspeed(
    processes: int, arguments: list[str], log: Path, script: Path = SCRIPT, **environment: str
) -> Launched:
    """Under the deepspeed launcher."""
    told = ["--num_accelerators", str(processes)]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), *told]
    return Launched([*runner, str(script), *arguments], log, **environment)


def torchrun(processes: int, arguments: list[str], log: Path) -> Launched:
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return Launched([*runner, str(SCRIPT), *arguments], log)


def _environment(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def _marked(process: psutil.Process, mark: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and _environment(process).get("MEGAVTP_TEST") == mark
    return False


def wait_for(condition: Callable[[], bool], timeout: float, tell: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s\n{tell()}"
        time.sleep(0.02)


def steps_done(output_dir: Path) -> dict[int, dict]:
    """Step -> the values of KEYS in metrics.jsonl. Each step is there once."""
    lines = [record for record in records(output_dir) if record["kind"] == "step"]
    found = {record["step"]: {key: record[key] for key in KEYS} for record in lines}
    assert len(found) == len(lines)
    return found


def events(output_dir: Path, kind: str) -> list[dict]:
    return [record for record in records(output_dir) if record["kind"] == kind]


def records(output_dir: Path) -> Iterator[dict]:
    path = output_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that is just being written, or was when the run was killed
            yield json.loads(line)
