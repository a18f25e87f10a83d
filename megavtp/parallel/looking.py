"""One rank looks at the files of a data set or a checkpoint, and tells the others what it found.

On shared storage a thousand ranks that list the same folders and ask for the same sizes would wait for its one
metadata server for minutes.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megavtp.errors import UserError
from megavtp.parallel.collectives import broadcast_object, is_first, together

PLACE = "MEGAVTP_LOCAL_RANK"  # the number of a rank on its machine, also where LOCAL_RANK is that of its only GPU
T = TypeVar("T")


class Found(Protocol):
    """What a look finds, which can be sent. ``landmark``: one of its files; ``digest``: hash of what all ranks need."""

    @property
    def landmark(self) -> Path: ...

    @property
    def digest(self) -> str: ...


F = TypeVar("F", bound=Found | None)


def from_first(work: Callable[[], T]) -> T:
    """Return on every rank what ``work()`` returns on rank 0. Its ``UserError`` is raised on all ranks."""
    return broadcast_object(together(lambda: work() if is_first() else None))


def look_once(look: Callable[[], F]) -> F:
    """Return on every rank what ``look()`` finds on rank 0, which sends it.

    A machine may have a copy on disks of its own. So the first rank of each other machine compares the landmark with
    that of rank 0, which takes one stat. Where it is another file, this rank looks, too, and must find the same.
    A ``UserError`` of any look is raised on all ranks.
    """
    found, place, host = from_first(lambda: _located(look()))

    def check_copy() -> None:
        if found is None or not leads_other_machine() or place_of(found.landmark) == place:
            return
        own = look()
        if own is None or own.digest != found.digest:
            raise UserError(
                f"{found.landmark.parent} on {socket.gethostname()} differs from the one on {host}: copy it there "
                "again, or put it on a file system that all machines share"
            )

    together(check_copy)
    return found


def _located(found: Found | None) -> tuple[Any, tuple[int, ...] | None, str]:
    return found, None if found is None else place_of(found.landmark), socket.gethostname()


def leads_other_machine() -> bool:
    """Tell whether this rank is the first one on its machine, and rank 0 is on another."""
    return not is_first() and os.environ.get(PLACE, os.environ.get("LOCAL_RANK")) == "0"


def place_of(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from its copies, on all machines that share it; None if it cannot be seen here."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_ctime_ns, facts.st_size  # no copy can be given the time of the change
