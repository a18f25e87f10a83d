"""The numbers of a run over its steps, in the panels that the page draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavtp.evaluation.report import CHANCE, show_metric
from megavtp.report.folder import KINDS, Number, Run, StepLine
from megavtp.training.pictures import TITLES

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


@dataclass(frozen=True)
class Group:
    title: str
    panels: Sequence[Panel]


_SPEED: Mapping[str, tuple[str, str, Callable[[StepLine], Number]]] = {
    "images_per_second": ("Images per second", "", lambda line: line.images_per_second),
    "mfu": ("Model FLOP utilisation", "%", lambda line: line.mfu),
    "data_wait": ("Time spent waiting for data", "%", lambda line: line.data_wait),
    "memory_gib": ("Peak memory in GiB", "", lambda line: line.memory_gib),
}


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
    terms = list(dict.fromkeys(term for _, run in runs for line in run.steps for term in line.terms))
    order = {name: index for index, name in enumerate(TITLES)}
    terms.sort(key=lambda term: order.get(term, len(order)))
    towers = list(dict.fromkeys(tower for _, run in runs for line in run.steps for tower in line.tower_grad_norms))
    return {
        "Loss terms": [
            Panel(TITLES.get(term, term), _curves(runs, lambda line, term=term: line.terms.get(term)))  # type: ignore[misc]
            for term in terms
        ],
        "Measures of held-out data while training": _evaluations(runs),
        "Gradient norms": [
            Panel("All weights", _curves(runs, lambda line: line.grad_norm)),
            Panel("All weights, largest step", _curves(runs, lambda line: line.grad_norm_max)),
            *(
                Panel(tower, _curves(runs, lambda line, tower=tower: line.tower_grad_norms.get(tower)))  # type: ignore[misc]
                for tower in (towers if len(towers) > 1 else ())
            ),
        ],
        "Learning rate and speed": [
            Panel("Learning rate", _curves(runs, lambda line: line.lr), smooth=False),
            *(Panel(title, _curves(runs, value), unit) for title, unit, value in _SPEED.values()),
        ],
    }


def _curves(runs: Iterable[tuple[int, Run]], value: Callable[[StepLine], Number]) -> list[Curve]:
    found = []
    for number, run in runs:
        pairs = [(line.step, y) for line in run.steps if (y := value(line)) is not None]
        if pairs:
            found.append(_curve(number, pairs))
    return found


def _curve(number: int, pairs: Sequence[tuple[int, float]]) -> Curve:
    """Make a curve of at most ``_POINTS`` points, each the mean of equally many neighbours."""
    points = np.asarray(pairs, dtype=float)
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
