"""What the study's commands print of its plan, its state and its costs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from megavtp.study.cells import Cell, links_of
from megavtp.study.config import StudyConfig
from megavtp.study.costs import Rates, device_hours
from megavtp.study.fits import LEAST_POINTS
from megavtp.study.links import Link
from megavtp.study.record import Record, is_finished, read_record
from megavtp.study.slurm import Job

Jobs = Mapping[Path, Job]  # of links, by their folders
NO_JOBS: Jobs = MappingProxyType({})
Records = Sequence[tuple[Link, Record | None]]  # of the links of a cell; None for one that has not begun


def plan_page(study: StudyConfig, cells: list[Cell], rates: Rates, devices: int | None = None) -> str:
    """Return the cells with their costs, and the sum over all links, each of which counts once; on so many
    ``devices``, or on this machine."""
    links = links_of(cells)
    rows = [["cell", "links", "pre-training", "all trainings", "hours"]]
    known: set[str] = set()
    for cell in cells:
        new = [link for link in cell.links if str(link.folder) not in known]
        known |= {str(link.folder) for link in new}
        rows.append([cell.name, str(len(new)), flops_text(cell.flops), flops_text(cell.all_flops), _hours(new, rates)])
    unknown = sorted({link.kind for link in links if rates.estimate(link) is None})
    left = [link for link in links if not is_finished(link, read_record(link))]
    where = "this machine"
    if devices is not None:
        where = f"{several(devices, 'device')} ({_hours(links, rates, devices)} device-hours)"
    lines = [
        *_aligned(rows), "",
        f"{len(cells)} cells of {len(links)} links: {_counts(links)}; a link counts in the first cell that needs it",
        f"{flops_text(sum(link.flops for link in links))} of training; {_hours(links, rates)} hours on {where}, of "
        f"which {_hours(left, rates)} are left",
    ]
    if unknown:
        lines.append(
            f"not in the hours: {', '.join(unknown)}; give their rate in cost, or run the study's first cell"
        )
    points, held_out = len(study.axes.get(study.curves.x, study.looks)), study.curves.held_out
    if points >= LEAST_POINTS > points - held_out:
        lines.append(
            f"nothing will be predicted: curves.held_out = {held_out} leaves {points - held_out} of {points} points, "
            f"and a fit needs {LEAST_POINTS}; give more, or curves.held_out=0"
        )
    return "\n".join(lines)


def status_page(cells: list[Cell], rates: Rates, jobs: Jobs = NO_JOBS) -> str:
    """Return a line for each cell: how many of its links have finished, what is next, and the hours it has taken; and
    a line for each of the ``jobs``."""
    rows = [["cell", "finished", "state", "hours taken", "device-hours", "hours left"]]
    states: Counter[str] = Counter()
    for cell in cells:
        records = records_of(cell)
        left = [link for link, record in records if not is_finished(link, record)]
        state, detail = cell_state(records, jobs)
        states[state] += 1
        done = f"{len(records) - len(left)}/{len(records)}"
        rows.append([cell.name, done, detail, *hours_taken(records), _hours(left, rates)])
    total = ", ".join(f"{count} {state}" for state, count in states.items())
    queue = [f"{link.kind} in {link.folder}: {jobs[link.folder]}" for link in links_of(cells) if link.folder in jobs]
    return "\n".join([*_aligned(rows), "", *queue, f"{len(cells)} cells: {total}"])


def records_of(cell: Cell) -> Records:
    """Read the record of each link of a cell."""
    return [(link, read_record(link)) for link in cell.links]


def hours_taken(records: Records) -> tuple[str, str]:
    """Format the hours and the device-hours that all links of a cell have taken, those that it shares included."""
    begun = [record for _, record in records if record is not None]
    devices = device_hours(begun)
    return f"{sum(record.seconds for record in begun) / 3600:.2f}", "?" if devices is None else f"{devices:.2f}"


def cost_text(cells: list[Cell]) -> str:
    """Say what the study has cost so far; a link counts once."""
    records = [(link, read_record(link)) for link in links_of(cells)]
    flops = sum(link.flops for link, record in records if is_finished(link, record))
    hours, devices = hours_taken(records)
    return f"The links that were run took {hours} hours, {devices} device-hours, for {flops_text(flops)} of training."


def cell_state(records: Records, jobs: Jobs = NO_JOBS) -> tuple[str, str]:
    """Return the state of a cell in a word, and in some words."""
    left = [(link, record) for link, record in records if not is_finished(link, record)]
    if not left:
        return "finished", "finished"
    queued = [(link, jobs[link.folder]) for link, _ in left if link.folder in jobs]
    for link, job in sorted(queued, key=lambda pair: pair[1].state == "pending"):
        return job.state, f"{link.kind} {job}"
    for state in ("failed", "begun"):
        for link, record in left:
            if record is not None and record.state == state:
                return state, f"{link.kind} {state}{f', see {link.log}' if state == 'failed' else ''}"
    return ("begun", f"{left[0][0].kind} is next") if len(left) < len(records) else ("waiting", "waiting")


def several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _counts(links: Sequence[Link]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(link.kind for link in links).items())


def _hours(links: Sequence[Link], rates: Rates, devices: int = 1) -> str:
    """Format the hours of links, times the devices; links of which nothing is known are left out."""
    known = [seconds for link in links if (seconds := rates.estimate(link)) is not None]
    return f"{devices * sum(known) / 3600:,.2f}" if known or not links else "?"


def flops_text(count: float) -> str:
    """Format a number of operations."""
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:.3g} FLOP"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
