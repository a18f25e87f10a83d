"""The numbers of a run over its steps, in the panels that the page draws."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavtp.evaluation.report import CHANCE, show_metric
from megavtp.report.folder import KINDS, Number, Run, StepLine
from megavtp.training.pictures import TITLES

_LARGEST = 1e30  # of a value that is drawn; beyond some 1e307 matplotlib fails
_OUTLIER = 8  # times the range of nineteen values in twenty; what is larger is cut off
_POINTS = 300  # of a curve; longer ones are averaged over neighbours


@dataclass(frozen=True)
class Curve:
    """One run's values over steps. ``run`` is the run's number on the page."""

    run: int
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Panel:
    """A small chart: one quantity, a curve for each run that has it.

    Attributes:
        unit: "" or "%", whose values are shares.
        smooth: draw the values faintly, and their running mean over them.
        level: what chance gives, as a dashed line.
    """

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    smooth: bool = True
    level: float | None = None

    @property
    def largest(self) -> float:
        return max(float(curve.values.max()) for curve in self.curves)

    def text(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.unit == "%" else f"{value:.3g}"

    @property
    def top(self) -> float | None:
        """Where to cut the chart off, if a few values are so large that nothing else could be seen; else None."""
        values = np.concatenate([curve.values for curve in self.curves])
        low, high = values.min(), np.percentile(values, 95)
        cut = len(values) > 8 and self.largest - low > _OUTLIER * (high - low) > 0
        return float(high + 0.25 * (high - low)) if cut else None


@dataclass(frozen=True)
class Group:
    title: str
    panels: Sequence[Panel]


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Return the panels, by kind of run and then by theme. Runs of one kind share panels; empty panels are left out."""
    groups: list[Group] = []
    for kind, name in KINDS.items():
        numbered = [(number, run) for number, run in enumerate(runs) if run.kind == kind]
        several = len({run.kind for run in runs}) > 1
        for title, panels in _themes(numbered).items():
            filled = [panel for panel in panels if panel.curves]
            if filled:
                groups.append(Group(f"{name}: {title[0].lower()}{title[1:]}" if several else title, filled))
    return groups


def _themes(runs: Sequence[tuple[int, Run]]) -> dict[str, list[Panel]]:
    order = {name: index for index, name in enumerate(TITLES)}
    terms = _by_name(runs, lambda line: line.terms)
    towers = _by_name(runs, lambda line: line.tower_grad_norms)
    return {
        "Loss terms": [
            Panel(TITLES.get(term, term), terms[term])
            for term in sorted(terms, key=lambda term: order.get(term, len(order)))
        ],
        "Measures of held-out data while training": _evaluations(runs),
        "Gradient norms": [
            Panel("All weights", _curves(runs, lambda line: line.grad_norm)),
            Panel("All weights, largest step", _curves(runs, lambda line: line.grad_norm_max)),
            *(Panel(tower, curves) for tower, curves in towers.items() if len(towers) > 1),
        ],
        "Learning rate and speed": [
            Panel("Learning rate", _curves(runs, lambda line: line.lr), smooth=False),
            Panel("Images per second", _curves(runs, lambda line: line.images_per_second)),
            Panel("Model FLOP utilisation", _curves(runs, lambda line: line.mfu), "%"),
            Panel("Time spent waiting for data", _curves(runs, lambda line: line.data_wait), "%"),
            Panel("Peak memory in GiB", _curves(runs, lambda line: line.memory_gib)),
        ],
    }


def _by_name(
    runs: Sequence[tuple[int, Run]], values: Callable[[StepLine], Mapping[str, Number]]
) -> dict[str, list[Curve]]:
    """Return the curves of each of the numbers that a line holds by name."""
    names = dict.fromkeys(name for _, run in runs for line in run.steps for name in values(line))
    return {name: _curves(runs, _number_of(name, values)) for name in names}


def _number_of(name: str, values: Callable[[StepLine], Mapping[str, Number]]) -> Callable[[StepLine], Number]:
    return lambda line: values(line).get(name)


def _curves(runs: Iterable[tuple[int, Run]], value: Callable[[StepLine], Number]) -> list[Curve]:
    found = []
    for number, run in runs:
        pairs = [(line.step, y) for line in run.steps if (y := value(line)) is not None]
        if pairs:
            found.append(_curve(number, pairs))
    return found


def _curve(number: int, pairs: Sequence[tuple[int, float]]) -> Curve:
    """Make a curve of at most ``_POINTS`` points, each the mean of equally many neighbours."""
    points = np.clip(np.asarray(pairs, dtype=float), -_LARGEST, _LARGEST)
    parts = np.array_split(points, min(_POINTS, len(points)))
    means = np.stack([part.mean(axis=0) for part in parts])
    return Curve(number, means[:, 0], means[:, 1])


def _evaluations(runs: Sequence[tuple[int, Run]]) -> list[Panel]:
    """Return a panel for each metric that a run measured twice or more."""
    found: dict[str, list[Curve]] = {}
    levels: dict[str, float] = {}
    for number, run in runs:
        values: dict[str, list[tuple[int, float]]] = {}
        for event in run.events_of("evaluation"):
            for name, value in _numbers(event).items():
                if name.startswith(CHANCE):
                    levels[name.removeprefix(CHANCE)] = value
                else:
                    values.setdefault(name, []).append((event["step"], value))
        for name, pairs in values.items():
            if len(pairs) > 1:
                found.setdefault(name, []).append(_curve(number, pairs))
    return [
        Panel(name, curves, "%" if show_metric(name, 0.0).endswith("%") else "", False, levels.get(name))
        for name, curves in found.items()
    ]


def _numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an event, whose names have a slash."""
    return {
        name: float(value) for name, value in event.items()
        if "/" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    }
