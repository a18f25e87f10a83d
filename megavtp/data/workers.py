"""Worker processes: how they end with the process that started them, and a map over jobs in order."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")
_CHUNK = 16  # jobs a process takes at a time
_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


def progress(items: Iterable[Result], total: int, title: str, quiet: bool) -> Iterator[Result]:
    """Show a tqdm bar on stderr, unless ``quiet`` or stderr is not a terminal."""
    return iter(tqdm(items, total=total, desc=title, disable=quiet or not sys.stderr.isatty()))


def ordered_map(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, title: str, quiet: bool
) -> Iterator[Result]:
    """Yield the results in the order of the jobs, from ``workers`` processes; few jobs are done in this process."""
    if workers < 2 or len(jobs) < 4 * _CHUNK:
        yield from progress(map(function, jobs), len(jobs), title, quiet)
        return
    # Workers are spawned, not forked, as the parent may have threads. It handles Ctrl-C; SIGTERM ends the pool.
    with multiprocessing.get_context("spawn").Pool(workers, serve_parent, ((signal.SIGINT,),)) as pool:
        yield from progress(pool.imap(function, jobs, _CHUNK), len(jobs), title, quiet)


def serve_parent(ignored: Sequence[signal.Signals]) -> None:
    """Make this worker process leave these signals to its parent, and end with it, however it ends.

    Linux kills the worker even while it is stuck in a read. It does so when the thread that started the worker ends,
    so workers must be started from a thread that outlives them.
    """
    for name in ignored:
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before it was asked for
        os._exit(1)
