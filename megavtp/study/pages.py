"""What the study's commands print: the plan, the state, and what the curves say."""

from collections import Counter
from collections.abc import Sequence

from megavtp.study.cells import Cell, links_of
from megavtp.study.config import StudyConfig
from megavtp.study.costs import Rates
from megavtp.study.curves import Fits, Line, Pair
from megavtp.study.fits import Interval
from megavtp.study.links import Link
from megavtp.study.record import Record, is_finished, read_record


def plan_page(study: StudyConfig, cells: list[Cell], rates: Rates, devices: int | None = None) -> str:
    """Return the cells with their costs, and the sum over all links, each of which counts once; on so many
    ``devices``, or on this machine."""
    links = links_of(cells)
    rows = [["cell", "links", "pre-training", "all trainings", "hours"]]
    known: set[str] = set()
    for cell in cells:
        new = [link for link in cell.links if str(link.folder) not in known]
        known |= {str(link.folder) for link in new}
        rows.append([cell.name, str(len(new)), _flops(cell.flops), _flops(cell.all_flops), _hours(new, rates)])
    unknown = sorted({link.kind for link in links if rates.estimate(link) is None})
    left = [link for link in links if not is_finished(link, read_record(link))]
    where = "this machine"
    if devices is not None:
        where = f"{devices} device{'s' if devices > 1 else ''} ({_hours(links, rates, devices)} device-hours)"
    lines = [
        *_aligned(rows), "",
        f"{len(cells)} cells of {len(links)} links: {_counts(links)}; a link counts in the first cell that needs it",
        f"{_flops(sum(link.flops for link in links))} of training; {_hours(links, rates)} hours on {where}, of which "
        f"{_hours(left, rates)} are left",
    ]
    if unknown:
        lines.append(
            f"not in the hours: {', '.join(unknown)}; give their rate in cost, or run the study's first cell"
        )
    return "\n".join(lines)


def status_page(cells: list[Cell], rates: Rates) -> str:
    """Return a line for each cell: how many of its links have finished, what is next, and the hours it has taken."""
    rows = [["cell", "finished", "state", "hours taken", "hours left"]]
    states: Counter[str] = Counter()
    for cell in cells:
        records = [(link, read_record(link)) for link in cell.links]
        left = [(link, record) for link, record in records if not is_finished(link, record)]
        state, detail = _state(left, begun=len(left) < len(records))
        states[state] += 1
        taken = sum(record.seconds for _, record in records if record is not None)
        rows.append([
            cell.name, f"{len(records) - len(left)}/{len(records)}", detail, f"{taken / 3600:.2f}",
            _hours([link for link, _ in left], rates),
        ])
    total = ", ".join(f"{count} {state}" for state, count in states.items())
    return "\n".join([*_aligned(rows), "", f"{len(cells)} cells: {total}"])


def _state(left: Sequence[tuple[Link, Record | None]], *, begun: bool) -> tuple[str, str]:
    """Return the state of a cell in a word, and in some words, from the links that have not finished."""
    if not left:
        return "finished", "finished"
    for state in ("failed", "begun"):
        for link, record in left:
            if record is not None and record.state == state:
                return state, f"{link.kind} {state}{f', see {link.log}' if state == 'failed' else ''}"
    return ("begun", f"{left[0][0].kind} is next") if begun else ("waiting", "waiting")


def curves_page(fits: Fits) -> str:
    """Return what the curves say, in words: crossings, predictions, noise, and what could not be computed."""
    return "\n".join([
        *(line for pair in fits.pairs for line in _pair(fits.x, pair)),
        *(text for line in fits.lines for text in _line(line)),
        *(f"{measure}: standard deviation between seeds {noise.deviation:.4g} ({noise.groups} cells repeated)"
          if noise else f"{measure}: nothing was repeated with another seed"
          for measure, noise in fits.noise.items()),
        *(f"curves.better.{measure}: {why}" for measure, why in fits.left_out.items()),
    ])


def _pair(x: str, pair: Pair) -> list[str]:
    found, where = pair.crossing, f"{pair.measure}: {pair.line} is better than {pair.other}"
    if found.at is not None:
        return [f"{where} from {x} {found.at:.3g} on ({_interval(found.interval)})"]
    shares = f"in {found.always:.0%} of the bootstrap everywhere, in {found.never:.0%} not at the end"
    return [f"{where}: no crossing within the data ({shares})"]


def _line(line: Line) -> list[str]:
    where = f"{line.measure} of {line.line}"
    told = [f"{what} left out: {why}" for what, why in line.left_out.items()]
    for point in line.predictions:
        off = "" if point.off is None else f", off by {point.off:+.1%}"
        told.append(
            f"{where} at {point.x:.3g}: predicted {point.predicted:.4g} ({_interval(point.interval)}), found "
            f"{point.observed:.4g}{off}"
        )
    return told


def _interval(interval: Interval) -> str:
    low, high = ("beyond the data" if end is None else f"{end:.3g}" for end in (interval.low, interval.high))
    return f"95 %: {low} to {high}"


def _counts(links: Sequence[Link]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(link.kind for link in links).items())


def _hours(links: Sequence[Link], rates: Rates, devices: int = 1) -> str:
    """Format the hours of links, times the devices; links of which nothing is known are left out."""
    known = [seconds for link in links if (seconds := rates.estimate(link)) is not None]
    return f"{devices * sum(known) / 3600:,.2f}" if known or not links else "?"


def _flops(count: float) -> str:
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
