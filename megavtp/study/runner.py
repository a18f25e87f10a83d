"""Run a study's links one after the other: finished ones are skipped, broken ones go on, failed ones are named."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

from megavtp import cli
from megavtp.data.folder_lock import FolderLock
from megavtp.errors import UserError
from megavtp.launch.ranks import STOPPED
from megavtp.study.cells import Cell, cells_of, links_of
from megavtp.study.config import STUDY, StudyConfig, keep_study, load_study, words
from megavtp.study.links import Link
from megavtp.study.locks import alone
from megavtp.study.record import (
    Record,
    State,
    check_links,
    check_unchanged,
    failure,
    is_finished,
    read_record,
    write_record,
)
from megavtp.study.results import write_results
from megavtp.study.slurm import slurm_launcher
from megavtp.training.output_dir import writing

# Runs a link's command, which inherits the locked descriptor, with its output in the link's log; returns the status.
Start = Callable[[list[str], Link, int], int]
_RUNNING = "running"  # the file that a link's process holds locked


def tell(line: str) -> None:
    print(line, flush=True)


def run_study(study: StudyConfig, start: Start | None = None, tell: Callable[[str], None] = tell) -> int:
    """Run what is left of a study and write its results; return the exit status, 1 if a link failed.

    Raises:
        UserError: a link was begun with other settings, or another process runs the study. Nothing has run then.
    """
    launcher = words(study, "launcher")
    failed: dict[Path, Link] = {}  # by the folder of each link that cannot finish, the one that failed
    with opened(study) as cells:
        links = links_of(cells)
        for number, link in enumerate(links, 1):
            if broken := [failed[before.folder] for before in link.after if before.folder in failed]:
                failed[link.folder] = broken[0]
            elif not is_finished(link, record := read_record(link)):
                tell(f"{number}/{len(links)} {link.kind} in {link.folder}: {'goes on' if record else 'begins'}")
                if not is_finished(link, _finish(link, launcher, start or run_command)):
                    failed[link.folder] = link
                    tell(f"failed: {failure(link)}")
                elif link.kind in ("evaluate", "generate"):
                    write_results(study, cells)
        write_results(study, cells)
    for link in {link.folder: link for link in failed.values()}.values():
        waiting = sum(any(failed.get(part.folder) is link for part in cell.links) for cell in cells)
        tell(f"failed: {failure(link)}; cells without a result: {waiting}")
    return 1 if failed else 0


@contextlib.contextmanager
def opened(study: StudyConfig) -> Iterator[list[Cell]]:
    """Lock a study's folder against other starts, keep the study in it, and yield the cells.

    UserError: a link was begun with other settings, what it was made from is gone, or another process holds the lock.
    """
    cells, folder = cells_of(study), Path(study.output_dir)
    check_links(links_of(cells))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, "set another output_dir")
    try:
        with writing(folder / STUDY):
            keep_study(study)
        yield cells
    finally:
        lock.close()


def run_link(study: StudyConfig, folder: Path, start: Start | None = None) -> int:
    """Run the link in a folder, as a SLURM job does; if a cell is complete with it, write the study's results.

    They are those of the study as it was last submitted, which may have been while this link ran.

    Returns:
        The exit status: 0: it has finished. ``STOPPED``: its state is saved, and it goes on from there. 1: it failed.

    Raises:
        UserError: the study has no such link, one before it has not finished, or it was begun with other settings.
    """
    cells = cells_of(study)
    link = next((link for link in links_of(cells) if link.folder == folder), None)
    if link is None:
        raise UserError(f"--link {folder}: no link of the study has this folder; study.py status names the cells")
    check_unchanged(link, read_record(link))
    for before in link.after:
        if not is_finished(before, read_record(before)):
            raise UserError(f"{link.kind} in {folder} needs {before.kind} in {before.folder}, which is not finished")
    record = _finish(link, slurm_launcher(study), start or run_command)
    if is_finished(link, record):
        kept = Path(study.output_dir) / STUDY
        latest = load_study(kept) if kept.exists() else study
        cells = cells_of(latest)
        if any(_completes(link, cell) for cell in cells):
            write_results(latest, cells)
        return 0
    tell(f"failed: {failure(link)}" if record.state == "failed" else f"stopped: {link.kind} in {folder}")
    return 1 if record.state == "failed" else STOPPED


def _completes(link: Link, cell: Cell) -> bool:
    """Whether a link is one of a cell's, all of which have finished."""
    return link in cell.links and all(is_finished(part, read_record(part)) for part in cell.links)


def _finish(link: Link, launcher: list[str], start: Start) -> Record:
    """Run a link's command, unless another process has just finished it, and return the record of how it ended.

    A training that was told to stop has saved its state: its record stays as begun.
    """
    with alone(link.folder / _RUNNING, "still running from an earlier start") as lock:
        record = read_record(link)
        if record is not None and is_finished(link, record):
            return record
        before = record.seconds if record else 0.0
        begun = Record(1, link.shown(launcher), dict(link.settings), "begun", None, before, whole=record is None)
        write_record(link, begun)
        if link.wants_new_place:
            for path in link.outputs:
                shutil.rmtree(path, ignore_errors=True)
        begin = time.monotonic()
        try:
            status = start(link.command(launcher), link, lock)
        except KeyboardInterrupt:
            write_record(link, replace(begun, seconds=before + time.monotonic() - begin))
            raise
        done = status == 0 and all(path.exists() for path in link.outputs)
        state: State = "finished" if done else "begun" if status == STOPPED and link.resumes else "failed"
        ended = replace(begun, state=state, exit=status, seconds=before + time.monotonic() - begin)
        write_record(link, ended)
        return ended


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
