"""What a study's curves say, in sentences: the answer first, then the curves themselves, and what is missing."""

from collections.abc import Sequence
from itertools import combinations
from statistics import stdev

from megavtp.study.config import StudyConfig, baseline_axes
from megavtp.study.curves import Fits, Line, Point
from megavtp.study.fits import TAIL, Crossing, Interval, Noise, difference
from megavtp.study.pages import flops_text, several


def answers(study: StudyConfig, fits: Fits, results: int, cells: int) -> list[str]:
    """Return the answer of a study in sentences: what is compared, how far it is, and for each measure which line is
    better from where on, with which certainty, beside the noise between repetitions.

    ``results`` of the ``cells`` have finished.
    """
    repeats = study.curves.repeats
    axes = "; ".join(f"{axis}: {', '.join(choices)}" for axis, choices in study.axes.items() if axis != repeats)
    looks, seeds = several(len(study.looks), "look"), several(len(study.seeds), "seed")
    again = f", each for all of {repeats}: {', '.join(study.axes[repeats])}" if repeats else ""
    told = [f"The study compares {axes or 'one set of objectives'}, at {looks} with {seeds} of the DiT{again}."]
    if results < cells:
        told.append(f"It is not finished: {results} of {cells} cells have a result, and what follows is preliminary.")
    pairs = _pairs_to_tell(study, fits)
    if study.curves.baseline:
        told += [verdict for measure, chosen in pairs.items() if (verdict := _verdict(study, fits, measure, chosen))]
    for measure, chosen in pairs.items():
        lines = [line for line in fits.lines if line.measure == measure]
        names = [line.line for line in lines]
        if alone := [name for name in names if study.curves.baseline and _baseline_of(study, name) not in names]:
            told.append(f"{_titled(study, measure)}: the baseline of {', '.join(alone)} has no result yet.")
        if len(lines) > 1 and all("fit" in line.left_out for line in lines):
            said = [_without_curves(fits.x, lines)]
        else:
            said = [_compared(fits, one, other) for one, other in chosen]
        told += [f"{_titled(study, measure)}: {text}" for text in said]
    return told


def _titled(study: StudyConfig, measure: str) -> str:
    return f"{measure} ({study.curves.better[measure]} is better)"


def _pairs_to_tell(study: StudyConfig, fits: Fits) -> dict[str, list[tuple[Line, Line]]]:
    """Return, by measure, the pairs of lines to compare: each with its baseline, or without a baseline all pairs."""
    found: dict[str, list[tuple[Line, Line]]] = {}
    for measure in fits.noise:
        lines = {line.line: line for line in fits.lines if line.measure == measure}
        if study.curves.baseline is None:
            found[measure] = list(combinations(lines.values(), 2))
            continue
        bases = {name: _baseline_of(study, name) for name in lines}
        found[measure] = [(lines[name], lines[base]) for name, base in bases.items() if base != name and base in lines]
    return found


def _baseline_of(study: StudyConfig, line: str) -> str:
    """Return the name of the line with the baseline's choice on its axis, and the same ones on all others."""
    (axis,) = baseline_axes(study)
    parts = line.split(", ")
    return ", ".join(f"{axis}={study.curves.baseline}" if part.startswith(f"{axis}=") else part for part in parts)


def _verdict(study: StudyConfig, fits: Fits, measure: str, pairs: Sequence[tuple[Line, Line]]) -> str | None:
    """Say in one sentence which lines are better than their baselines at the end of what both were run for; None if
    there are no curves that could tell."""
    crossings = _crossings(fits, measure)
    if not any((line.line, base.line) in crossings for line, base in pairs):
        return None
    words: dict[str, list[str]] = {"better": [], "not better": [], "undecided": [], "without a curve": []}
    for line, base in pairs:
        found = crossings.get((line.line, base.line))
        if found is None:
            words["without a curve"].append(line.line)
        elif found.never < TAIL and (found.everywhere or found.at is not None):
            begin = "everywhere" if found.at is None else f"from {_at(fits.x, found.at)} on"
            words["better"].append(f"{line.line} (by the fitted curves {begin})")
        elif found.never > 1 - TAIL:
            words["not better"].append(line.line)
        else:
            words["undecided"].append(f"{line.line} (better in {100 * (1 - found.never):.0f} % of the bootstrap)")
    said = "; ".join(f"{word}: {', '.join(names)}" for word, names in words.items() if names)
    return (
        f"{_titled(study, measure)}, beside the baseline {study.curves.baseline}, at the end of what both were run "
        f"for: {said}."
    )


def _crossings(fits: Fits, measure: str) -> dict[tuple[str, str], Crossing]:
    """Return by two lines from where on the first is better."""
    return {(pair.line, pair.other): pair.crossing for pair in fits.pairs if pair.measure == measure}


def _without_curves(x: str, lines: Sequence[Line]) -> str:
    """Say how far lines are that all have too few points for a curve."""
    ends = [f"{line.line} {_repeated(line.points[-1])} at {_at(x, line.points[-1].x)}" for line in lines]
    return f"there are too few points for curves yet. The last ones are {'; '.join(ends)}."


def _compared(fits: Fits, one: Line, other: Line) -> str:
    """Say in which order two lines of one measure lie."""
    pairs = _crossings(fits, one.measure)
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
    where = f"{several(noise.places, 'place')}, {several(noise.freedom, 'degree')} of freedom"
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
