"""A run that is killed at an operation on a file of its folder, any of them, then started again: as if it never was.

`make test` takes some of the operations, `make crash-sweep` all (CRASH_POINTS=all).
"""

from __future__ import annotations

import builtins
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import free_port
from launched import SCRIPT, events, steps_done

POINTS = os.environ.get("CRASH_POINTS", "4")  # of each start, or "all"
STEPS = 4
# One objective, the one that has pictures and is evaluated: small checkpoints, and all kinds of files.
TINY = [
    f"train.steps={STEPS}", "train.checkpoint_every=2", "train.keep_last=1", "train.batch_size=8",
    "objectives.contrastive.weight=0", "objectives.self_distillation.weight=0", "objectives.reconstruction.batch=8",
    "telemetry.pictures_every=2", "telemetry.pictures=2", "evaluation.at_end=true", "evaluation.max_samples=4",
]
_PATHS = {  # functions of os that change what is on the disk -> the place of the path that is made or unmade
    "mkdir": 0, "rmdir": 0, "unlink": 0, "remove": 0, "truncate": 0, "rename": 1, "replace": 1, "link": 1, "symlink": 1,
}
_DESCRIPTORS = ("write", "pwrite", "fsync", "ftruncate")
_BUFFER = 1 << 16  # of files: a tensor file is a dozen writes rather than a hundred
_RANDOM = re.compile(r"-[0-9a-f]{16}-")  # a run's token in the names of unfinished checkpoints


class Operations:
    """Counts this process's operations on files in ``folder``; with ``at`` the process is killed at that one, and a
    write is then half done. An operation is named by what it is, on which file, and which time: not by its place among
    the others, as a checkpoint is written while the run goes on."""

    def __init__(self, folder: Path, at: str | None):
        self.folder, self.at = str(folder), at
        self.names: list[str] = []
        self._times: Counter[str] = Counter()

    def meet(self, kind: str, path: str, before: Callable[[], None] = lambda: None) -> None:
        if path != self.folder and not path.startswith(self.folder + os.sep):
            return
        name = f"{kind} {_RANDOM.sub('-TOKEN-', os.path.relpath(path, self.folder))}"
        self._times[name] += 1
        name += f" {self._times[name]}"
        self.names.append(name)
        if name == self.at:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(self) -> None:
        for name, place in _PATHS.items():
            setattr(os, name, self._of_path(name, getattr(os, name), place))
        for name in _DESCRIPTORS:
            setattr(os, name, self._of_descriptor(name, getattr(os, name)))
        plain_open, os_open = io.open, os.open

        def low_open(path, flags, *args, dir_fd=None, **options):
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.meet("open", _whole(path, dir_fd))
            return os_open(path, flags, *args, dir_fd=dir_fd, **options)

        def high_open(file, mode="r", *args, **options):
            inside = not isinstance(file, int) and _whole(file).startswith(self.folder + os.sep)
            if not inside or not set(mode) & set("wax+"):
                return plain_open(file, mode, *args, **options)
            assert set(mode) <= set("wb"), f"{file} is opened with {mode}, which is not counted"
            self.meet("open", _whole(file))
            return io.BufferedWriter(_Raw(os.fspath(file), self), _BUFFER)

        os.open, io.open, builtins.open = low_open, high_open, high_open

    def _of_path(self, name: str, original: Callable, place: int) -> Callable:
        def call(*args, **options):
            directory = options.get("dir_fd") or options.get("dst_dir_fd")
            self.meet(name, _whole(args[place], directory))
            return original(*args, **options)

        return call

    def _of_descriptor(self, name: str, original: Callable) -> Callable:
        def call(descriptor, *args):
            def write_half() -> None:
                if "write" in name:
                    original(descriptor, args[0][: len(args[0]) // 2], *args[1:])

            self.meet(name, _of(descriptor), write_half)
            return original(descriptor, *args)

        return call


class _Raw(io.FileIO):
    """A file whose writes are met."""

    def __init__(self, path: str, operations: Operations):
        super().__init__(path, "w")
        self._operations = operations

    def write(self, data) -> int:
        data = memoryview(data)
        self._operations.meet("write", _of(self.fileno()), lambda: super(_Raw, self).write(data[: len(data) // 2]))
        return super().write(data)


def _of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _whole(path, directory: int | None = None) -> str:
    return os.path.join(os.getcwd() if directory is None else _of(directory), os.fspath(path))


def _start(command: list[str], output: Path, log: Path, at: str | None = None, note: Path | None = None) -> int:
    """One run in a fork of this process; its exit status, -9 if it was killed."""
    port = free_port()
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = [str(SCRIPT), *command, f"output_dir={output}"]
        status = 1
        try:
            from megavtp.launch import ranks
            from megavtp.pretraining import launcher

            operations = Operations(output, at)
            leave = os._exit

            def noting(told: int) -> None:
                if note is not None:
                    Path(note).write_text(json.dumps(operations.names))
                leave(told)

            os._exit = noting
            operations.patch()
            ranks.run_ranks(launcher.PRETRAINING.main)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left_by(output: Path) -> dict:
    """What a finished run leaves, without what tells of its interruptions."""
    checkpoints = output / "checkpoints"
    latest = os.readlink(checkpoints / "latest")
    index = json.loads((checkpoints / latest / "checkpoint.json").read_text())
    names = (str(path.relative_to(output)) for path in output.rglob("*"))
    return {
        "latest": latest, "weights": {name: facts["sha256"] for name, facts in index["files"].items()},
        "steps": steps_done(output), "saved": sorted({event["step"] for event in events(output, "checkpoint")}),
        "config": (output / "config.yaml").read_text().replace(str(output), "OUT"),
        # The pictures of a step after which the run was killed are not drawn again.
        "files": sorted(name for name in names if not name.startswith("pictures/")),
        "evaluation": json.loads((output / "evaluation.json").read_text()),
    }


def spread(names: list[str]) -> list[str]:
    if POINTS == "all":
        return names
    count = int(POINTS)
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


def sweep(recipe: str, folder: Path) -> None:
    """Write to ``folder/result.json`` how many operations there are, which were tried, and which ended otherwise."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  these imports take seconds: once for all runs
    import matplotlib.figure  # noqa: F401
    import torch
    from tqdm import tqdm

    import megavtp.pretraining.launcher  # noqa: F401

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is one for several processes, which a kill would leave behind
    command, log = ["--config", recipe, *TINY], folder / "log"
    assert _start(command, folder / "whole", log, note=folder / "names") == 0, log.read_text()
    expected = left_by(folder / "whole")
    fresh = json.loads((folder / "names").read_text())
    # Another start: of a run that was killed when its first checkpoint was published, but not linked.
    (linking,) = (name for name in fresh if name == "symlink checkpoints/latest.tmp 1")
    assert _start(command, folder / "begun", log, at=linking) == -signal.SIGKILL, log.read_text()
    shutil.copytree(folder / "begun", folder / "resumed", symlinks=True)
    assert _start(command, folder / "resumed", log, note=folder / "names") == 0, log.read_text()
    assert left_by(folder / "resumed") == expected
    resumed = json.loads((folder / "names").read_text())
    tried, wrong = 0, []
    for begun, names in ((None, fresh), (folder / "begun", resumed)):
        for name in spread(names):
            output = folder / "run"
            shutil.rmtree(output, ignore_errors=True)
            log.unlink()
            if begun:
                shutil.copytree(begun, output, symlinks=True)
            problem = _tried(command, output, log, name, expected)
            tried += 1
            if problem:
                wrong.append(f"{'resumed' if begun else 'fresh'}, {name}: {problem}\n{log.read_text()}")
            print(tried, "of", len(fresh) + len(resumed), name, problem or "agrees", file=sys.stderr, flush=True)
    result = {"operations": [len(fresh), len(resumed)], "tried": tried, "wrong": wrong}
    (folder / "result.json").write_text(json.dumps(result))


def _tried(command: list[str], output: Path, log: Path, name: str, expected: dict) -> str:
    if (status := _start(command, output, log, at=name)) != -signal.SIGKILL:
        return f"was not met, the run ended with {status}"
    if (status := _start(command, output, log)) != 0:
        return f"the next start ended with {status}"
    found = left_by(output)
    return "; ".join(f"{key}: {found[key]}, not {expected[key]}" for key in expected if found[key] != expected[key])


@pytest.mark.timeout(4 * 3600 if POINTS == "all" else 300)
def test_a_run_that_is_killed_at_a_file_operation_ends_as_if_it_was_not(recipe, tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=sweep, args=(recipe, tmp_path))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    assert process.exitcode == 0, (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    result = json.loads((tmp_path / "result.json").read_text())
    print(result["operations"], "operations,", result["tried"], "tried,", len(result["wrong"]), "ended otherwise")
    assert min(result["operations"]) > 50 and result["tried"] >= 8
    assert not result["wrong"], "\n".join(result["wrong"])
