"""Where this rank is in its work: what messages about a failed, lost or hung rank say of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """What a rank does at a time.

    number: how many phases it has entered. All ranks enter the same ones in the same order, so a smaller number is a
        rank behind the others.
    since: ``time.monotonic()`` of its begin.
    slow: reads or writes much, or runs an evaluation: may take longer than a part of a step.
    """

    number: int
    name: str
    since: float
    slow: bool


_current = Phase(0, "starting", time.monotonic(), True)
_working = threading.main_thread()
_waiting: set[threading.Thread] = set()  # for other ranks


def enter(name: str, *, slow: bool = False) -> None:
    """Begin a phase, as in "step 12, pass contrastive". Host work of a microsecond."""
    global _current
    _current = Phase(_current.number + 1, name, time.monotonic(), slow)


def current() -> Phase:
    return _current


@contextmanager
def handed_to(thread: threading.Thread) -> Iterator[None]:
    """The main thread waits for this one: where that is, is where the rank is."""
    global _working
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _working = thread
    try:
        yield
    finally:
        _working = threading.main_thread()


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """This thread waits for other ranks, as in a collective, but by means that are not of torch.distributed."""
    thread = threading.current_thread()
    _waiting.add(thread)
    try:
        yield
    finally:
        _waiting.discard(thread)


def working_thread() -> tuple[threading.Thread, bool]:
    """The thread that does this rank's work now, and whether it is ``waiting_for_others``."""
    thread = _working
    return thread, thread in _waiting
