"""Which rank is lost or hangs, judged from what the ranks report of themselves."""

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megavtp.launch import phase

REPORTS = "watch"  # prefix of the ranks' reports in the store of the rendezvous, by rank
_SLOW = 3  # factor on the limits in phases that read or write much
_SILENCE = 60.0  # seconds without a sign of life, at most; less if the limit for hangs is less
_SILENCE_AFTER_LOSS = 5.0  # the same limit, once a rank has noticed that a connection broke
_MUTE = 3.0  # seconds; a rank that hangs and is silent for longer is stuck as a whole, not just its main thread
_LOST = "no sign of life: killed (out of memory?), crashed, stuck in C code, or the machine is lost"
# Code in these files waits for other ranks.
_COLLECTIVE = (
    "/torch/distributed/", "/deepspeed/comm/", "megavtp/parallel/collectives.py", "megavtp/parallel/messages.py",
)
_OURS = str(Path(__file__).resolve().parents[1])


class _Json:
    """What a dataclass needs to go through the store, as JSON."""

    def dump(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def load(cls, text: bytes | str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Report(_Json):
    """What a rank tells of itself, about once a second.

    Attributes:
        phase, number, slow: as in ``phase.Phase``.
        age: seconds since the phase began.
        broken: a connection to another rank broke.
        at: "file:line in function" of the innermost own code.
        in_collective: whether it waits for other ranks there.
    """

    host: str
    phase: str
    number: int
    slow: bool
    age: float
    broken: bool
    at: str
    in_collective: bool


@dataclass(frozen=True)
class Verdict(_Json):
    """Why all ranks end: ``text`` says so, and ``ranks`` are those to blame."""

    text: str
    ranks: list[int]


def limit_of(timeout: float, slow: bool) -> float:
    """Return the seconds that a phase may take; ``timeout`` 0 means no limit."""
    return (timeout or float("inf")) * (_SLOW if slow else 1)


def silence_of(timeout: float, slow: bool, broken: bool = False) -> float:
    """Return the seconds without a sign of life after which a rank counts as lost; fewer once a connection broke."""
    return _SILENCE_AFTER_LOSS if broken else min(_SILENCE, timeout or _SILENCE) * (_SLOW if slow else 1)


def judge(
    reports: Mapping[int, Report], silent: Mapping[int, float], timeout: float, broken: bool = False
) -> Verdict | None:
    """Return the verdict on all ranks, None if all are well.

    Args:
        silent: seconds since each rank's last sign of life.
        timeout: seconds a phase may take on any rank, 0 = no limit.
        broken: whether the judge's own connection to another rank broke.
    """
    broken = broken or any(report.broken for report in reports.values())
    gone = [rank for rank, report in reports.items() if silent[rank] > silence_of(timeout, report.slow, broken)]
    if gone:
        return lost(gone, reports)
    # A rank that waits for another has come as far as the other, or farther.
    first = min(report.number for report in reports.values())
    behind = [rank for rank, report in reports.items() if report.number == first]
    behind = [rank for rank in behind if not reports[rank].in_collective] or behind
    # The others may have waited for longer than these ranks are in their phase: these ranks' own time counts.
    ages = {rank: reports[rank].age + silent[rank] for rank in behind}
    # A rank whose connection broke waits for the verdict, and does not hang.
    if not any(ages[rank] > limit_of(timeout, reports[rank].slow) and not reports[rank].broken for rank in behind):
        return None
    if all(silent[rank] > _MUTE for rank in behind):
        return lost(behind, reports)
    age = max(ages.values())
    return Verdict(
        f"{_those(behind, reports)} hang{'s' * (len(behind) == 1)}: no progress for {age:.0f} s (limit: "
        f"parallel.timeout = {timeout:g} s), {_where(behind, reports)}", behind,
    )


def lost(ranks: list[int], reports: Mapping[int, Report]) -> Verdict:
    return Verdict(f"{_those(ranks, reports)}: {_LOST}; last seen {_where(ranks, reports)}", ranks)


def _those(ranks: Sequence[int], reports: Mapping[int, Report]) -> str:
    named = [f"{rank} ({reports[rank].host})" for rank in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(named)}{more}"


def _where(ranks: Sequence[int], reports: Mapping[int, Report]) -> str:
    """Say where the ranks were seen last, each line of code once."""
    seen = {reports[r].phase + (f" at {reports[r].at}" if reports[r].at else ""): r for r in reversed(ranks)}
    if len(seen) == 1:
        return f"in {next(iter(seen))}"
    return "; ".join(f"rank {rank} in {where}" for where, rank in sorted(seen.items(), key=lambda x: x[1])[:8])


def own_report(host: str, broken: bool = False) -> Report:
    now = phase.current()
    at, waits = position()
    return Report(host, now.name, now.number, now.slow, now.age, broken, at, waits)


def position() -> tuple[str, bool]:
    """Return ("file:line in function" of the innermost own code, whether it waits for other ranks there).

    It is asked of the thread that does this rank's work.
    """
    thread, waits = phase.working_thread()
    if thread is threading.current_thread():
        return "", False  # the answer would be this line
    frame = sys._current_frames().get(thread.ident or 0)
    waits = waits or (frame is not None and frame.f_code.co_name in ("wait", "synchronize"))
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or any(path in file for path in _COLLECTIVE)
        if file.startswith(_OURS):
            return f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "", waits
