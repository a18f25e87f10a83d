"""Where this rank is in its work: what messages about a failed, lost or hung rank say of it."""

from __future__ import annotations

import time
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


def enter(name: str, *, slow: bool = False) -> None:
    """Begin a phase, as in "step 12, pass contrastive". Host work of a microsecond."""
    global _current
    _current = Phase(_current.number + 1, name, time.monotonic(), slow)


def current() -> Phase:
    return _current
