"""What the study's commands print: the plan, the state, and what the curves say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import stdev
from types import MappingProxyType

from megavtp.study.cells import Cell, links_of
from megavtp.study.config import StudyConfig
from megavtp.study.costs import Rates, device_hours
from megavtp.study.curves import Fits, Line, Point
from megavtp.study.fits import LEAST_POINTS, TAIL, Crossing, Interval, Noise, difference
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
        where = f"{_several(devices, 'device')} ({_hours(links, rates, devices)} device-hours)"
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


def answers(study: StudyConfig, fits: Fits, results: int, cells: int) -> list[str]:
    """Return the answer of a study in sentences: what is compared, how far it is, and for each measure which line is
    better from where on, with which certainty, beside the noise between repetitions.

    ``results`` of the ``cells`` have finished.
    """
    repeats = study.curves.repeats
    axes = "; ".join(f"{axis}: {', '.join(choices)}" for axis, choices in study.axes.items() if axis != repeats)
    looks, seeds = _several(len(study.looks), "look"), _several(len(study.seeds), "seed")
    again = f", each for all of {repeats}: {', '.join(study.axes[repeats])}" if repeats else ""
    told = [f"The study compares {axes or 'one set of objectives'}, at {looks} with {seeds} of the DiT{again}."]
    if results < cells:
        told.append(f"It is not finished: {results} of {cells} cells have a result, and what follows is preliminary.")
    for measure in fits.noise:
        lines = [line for line in fits.lines if line.measure == measure]
        if len(lines) > 1 and all("fit" in line.left_out for line in lines):
            said = [_without_curves(fits.x, lines)]
        else:
            said = [_compared(fits, one, other) for one, other in combinations(lines, 2)]
        told += [f"{measure} ({study.curves.better[measure]} is better): {text}" for text in said]
    return told


def _without_curves(x: str, lines: Sequence[Line]) -> str:
    """Say how far lines are that all have too few points for a curve."""
    ends = [f"{line.line} {_repeated(line.points[-1])} at {_at(x, line.points[-1].x)}" for line in lines]
    return f"there are too few points for curves yet. The last ones are {'; '.join(ends)}."


def _compared(fits: Fits, one: Line, other: Line) -> str:
    """Say in which order two lines of one measure lie."""
    pairs = {(pair.line, pair.other): pair.crossing for pair in fits.pairs if pair.measure == one.measure}
    found = {way: pairs[way] for way in ((one.line, other.line), (other.line, one.line)) if way in pairs}
    if not found and not one.left_out and len(one.points) == len(other.points) == 1:
        return _apart(one, other)
    if not found:
        reasons = [line.left_out["fit"] for line in (one, other) if "fit" in line.left_out]
        why = reasons[0] if reasons else f"they have no {fits.x} in common"
        return f"whether the curves of {one.line} and {other.line} cross cannot be said yet ({why})."
    (better, worse), best = max(found.items(), key=lambda item: (item[1].everywhere, item[1].at is not None))
    both = f"from {_at(fits.x, best.low)} to {_at(fits.x, best.high)}"
    if best.everywhere:
        said = (
            f"{better} is better than {worse} {both}, all that both were run for, without a crossing; so it is in "
            f"{100 * best.always:.0f} % of the bootstrap, and in {100 * best.never:.0f} % it is not the better one at "
            "the end."
        )
    elif best.at is not None:
        said = (
            f"{better} is better than {worse} from {_at(fits.x, best.at)} on ({_around(fits.x, best)}); in "
            f"{100 * (1 - best.never):.0f} % of the bootstrap it is the better one at the end. Both were run {both}."
        )
    else:
        said = f"The curves of {better} and {worse} end as equals, of what both were run for, {both}."
    noise = fits.noise[one.measure]
    beside = f"the standard deviation between repetitions is {noise.deviation:.4g}" if noise else "nothing was repeated"
    last = {line.line: line.points[-1] for line in (one, other)}
    ends = [f"{last[name].y:.4g} at {_at(fits.x, last[name].x)}" for name in (better, worse)]
    return f"{said} Their last points are {ends[0]} and {ends[1]}; {beside}."


def _apart(one: Line, other: Line) -> str:
    """Say how far two lines of one point each are apart."""
    points = one.points[0], other.points[0]
    ends = [f"{line.line} {_repeated(point)}" for line, point in zip((one, other), points)]
    interval = difference(points[0].values, points[1].values)
    certain = f" ({_interval(interval)})" if interval else ""
    return f"{ends[0]}; {ends[1]}. The difference is {points[0].y - points[1].y:.4g}{certain}."


def _repeated(point: Point) -> str:
    if len(point.values) == 1:
        return f"{point.y:.4g}"
    return f"{point.y:.4g} (mean of {len(point.values)}, standard deviation {stdev(point.values):.2g})"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def curves_page(study: StudyConfig, fits: Fits, results: int, cells: int) -> str:
    """Return what the curves say, in words: the answer, predictions, noise, and what could not be computed."""
    return "\n".join([*answers(study, fits, results, cells), *remarks(fits)])


def remarks(fits: Fits) -> list[str]:
    """Return what the curves say besides the answer: themselves, predictions, noise, and what is missing."""
    return [
        *(text for line in fits.lines for text in _line(fits.x, line)),
        *(f"{measure}: {_noise(noise)}" for measure, noise in fits.noise.items()),
        *(f"{measure}: no number from {', '.join(cells)}, which finished without one; their metrics.json may say why"
          for measure, cells in fits.missing.items()),
        *(f"curves.better.{measure}: {why}" for measure, why in fits.left_out.items()),
    ]


def _noise(noise: Noise | None) -> str:
    if noise is None:
        return "nothing was repeated that it depends on"
    where = f"{_several(noise.places, 'place')}, {_several(noise.freedom, 'degree')} of freedom"
    return f"standard deviation between repetitions {noise.deviation:.4g} ({where})"


def _line(x: str, line: Line) -> list[str]:
    where = f"{line.measure} of {line.line}"
    told = [f"{what} left out: {why}" for what, why in line.left_out.items()]
    if line.fit:
        known = [f"{name} = {line.fit.parameters[name]:.4g} ({_interval(line.fit.intervals[name])})" for name in "cd"]
        form = "y = a (x + b)^-c + d" if line.fit.parameters["b"] else "y = a x^-c + d"
        told.append(f"{where}: {form} through {len(line.points)} points has {known[0]} and {known[1]}")
    for point in line.predictions:
        off = "" if point.off is None else f", off by {point.off:+.1%}"
        told.append(
            f"{where} at {_at(x, point.x)}: predicted {point.predicted:.4g} ({_interval(point.interval)}), found "
            f"{point.observed:.4g}{off}"
        )
    return told


def _interval(interval: Interval) -> str:
    """Format an interval of a measure, or of a parameter."""
    return f"95 %: {interval.low:.4g} to {interval.high:.4g}"


def _around(x: str, crossing: Crossing) -> str:
    """Format the interval of a crossing, whose ends may lie before or after all that both curves have."""
    interval = crossing.interval
    before, after = "before the first look", "after the last"
    low = _at(x, interval.low) if interval.low is not None else before if crossing.always >= TAIL else after
    high = _at(x, interval.high) if interval.high is not None else after if crossing.never >= TAIL else before
    return f"95 %: {low} to {high}"


def _at(x: str, value: float) -> str:
    """Format a place on the axis ``x``."""
    return flops_text(value) if x == "flops" else f"{x} {value:.3g}"


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
