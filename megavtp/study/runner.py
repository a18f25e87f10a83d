"""Run a study's links one after the other: finished ones are skipped, broken ones go on, failed ones are named."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

from megavtp import cli
from megavtp.data.folder_lock import FolderLock
from megavtp.errors import UserError
from megavtp.study.cells import cells_of, links_of
from megavtp.study.config import StudyConfig, words
from megavtp.study.links import Link
from megavtp.study.record import Record, check_unchanged, failure, is_finished, read_record, write_record
from megavtp.study.results import write_results
from megavtp.training.output_dir import writing

# Runs a link's command, which inherits the locked descriptor, with its output in the link's log; returns the status.
Start = Callable[[list[str], Link, int], int]
_RUNNING = "running"  # the file that a link's process holds locked
_POLL = 2.0  # seconds between two looks at a link that an earlier start left running


def _tell(line: str) -> None:
    print(line, flush=True)


def run_study(study: StudyConfig, start: Start | None = None, tell: Callable[[str], None] = _tell) -> int:
    """Run what is left of a study and write its results; return the exit status, 1 if a link failed.

    Raises:
        UserError: a link was begun with other settings, or another process runs the study. Nothing has run then.
    """
    cells = cells_of(study)
    launcher, folder = words(study, "launcher"), Path(study.output_dir)
    links = links_of(cells)
    for link in links:
        check_unchanged(link, read_record(link))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, "set another output_dir")
    failed: dict[Path, Link] = {}  # by the folder of each link that cannot finish, the one that failed
    try:
        for number, link in enumerate(links, 1):
            if broken := [failed[before.folder] for before in link.after if before.folder in failed]:
                failed[link.folder] = broken[0]
            elif not is_finished(link, record := read_record(link)):
                tell(f"{number}/{len(links)} {link.kind} in {link.folder}: {'goes on' if record else 'begins'}")
                if not _finish(link, record, launcher, start or run_command):
                    failed[link.folder] = link
                    tell(f"failed: {failure(link)}")
                elif link.kind in ("evaluate", "generate"):
                    write_results(study, cells)
        write_results(study, cells)
    finally:
        lock.close()
    for link in {link.folder: link for link in failed.values()}.values():
        waiting = sum(any(failed.get(part.folder) is link for part in cell.links) for cell in cells)
        tell(f"failed: {failure(link)}; cells without a result: {waiting}")
    return 1 if failed else 0


def _finish(link: Link, record: Record | None, launcher: list[str], start: Start) -> bool:
    """Run a link's command and record how it ended; return whether it has finished."""
    before = record.seconds if record else 0.0
    begun = Record(1, link.shown(launcher), dict(link.settings), "begun", None, before, whole=record is None)
    write_record(link, begun)
    with _alone(link.folder) as lock:
        if link.wants_new_place:
            for path in link.outputs:
                shutil.rmtree(path, ignore_errors=True)
        begin = time.monotonic()
        status = start(link.command(launcher), link, lock)
    done = status == 0 and all(path.exists() for path in link.outputs)
    seconds = begun.seconds + time.monotonic() - begin
    write_record(link, replace(begun, state="finished" if done else "failed", exit=status, seconds=seconds))
    return done


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Wait until no process of an earlier start, which was killed, works in the folder any more; yield the lock."""
    descriptor = os.open(folder / _RUNNING, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    print(f"{folder}: still running from an earlier start; waiting for it", file=sys.stderr, flush=True)
                told = True
                time.sleep(_POLL)
        yield descriptor
    finally:
        os.close(descriptor)


def run_command(command: list[str], link: Link, lock: int) -> int:
    """Run a command with its output in the link's log; return its exit status.

    When this process is told to stop, the command is told so, too, and is waited for, as it may save its state. If this
    process is killed, the command goes on, and its lock on the folder tells the next start.
    """
    with open(link.log, "ab") as log, _stoppable():
        log.write(f"$ {link.kind}: {' '.join(command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise UserError(
                f"{command[0]} cannot be started ({error.strerror}); install it, or name another launcher"
            ) from None
        try:
            return process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Make the signals that ask a run to stop act as Ctrl-C does."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = {name: signal.signal(name, interrupt) for name in cli.stop_signals()}
    try:
        yield
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
