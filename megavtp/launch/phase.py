"""Where this rank is in its work, for messages about a rank that failed, is lost or hangs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Phase:
    """What a rank is doing.

    Attributes:
        number: how many phases the rank has entered. All ranks enter the same ones in the same order, so the rank with
            a smaller number is behind the others.
        since: ``time.monotonic()`` when it began, plus the seconds for which this process was suspended in it.
        slow: it reads or writes much, or runs an evaluation, and may take longer than the others.
    """

    number: int
    name: str
    since: float
    slow: bool

    @property
    def age(self) -> float:
        """Seconds since it began, without those of a suspension."""
        return time.monotonic() - self.since


_current = Phase(0, "starting", time.monotonic(), True)
_working = threading.main_thread()
_waiting: set[threading.Thread] = set()  # for other ranks


def enter(name: str, *, slow: bool = False) -> None:
    """Begin a phase, as in "step 12, pass contrastive". It costs the host a microsecond."""
    global _current
    _current = Phase(_current.number + 1, name, time.monotonic(), slow)


def current() -> Phase:
    return _current


@contextmanager
def handed_to(thread: threading.Thread) -> Iterator[None]:
    """While the main thread waits for ``thread``, the rank is where that thread is."""
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
    """Mark that this thread waits for other ranks, as in a collective, but not in torch.distributed."""
    thread = threading.current_thread()
    _waiting.add(thread)
    try:
        yield
    finally:
        _waiting.discard(thread)


def working_thread() -> tuple[threading.Thread, bool]:
    """Return the thread that does this rank's work now, and whether it is ``waiting_for_others``."""
    thread = _working
    return thread, thread in _waiting
