"""Map over jobs with a few processes, in order, with a progress bar."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")
_CHUNK = 16  # jobs a process takes at a time


def progress(items: Iterable[Result], total: int, title: str, quiet: bool) -> Iterator[Result]:
    """A tqdm bar on stderr; none when quiet or when stderr is not a terminal."""
    return iter(tqdm(items, total=total, desc=title, disable=quiet or not sys.stderr.isatty()))


def ordered_map(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, title: str, quiet: bool
) -> Iterator[Result]:
    """``map`` by ``workers`` processes, results in the order of the jobs; in this process if that is no gain."""
    if workers < 2 or len(jobs) < 4 * _CHUNK:
        yield from progress(map(function, jobs), len(jobs), title, quiet)
        return
    # Started anew, not forked: the parent may have threads. Ctrl-C is the parent's to handle.
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from progress(pool.imap(function, jobs, _CHUNK), len(jobs), title, quiet)
