"""Curves through the results of a study: one for each measure and line, where a line has one choice on each axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from megavtp.errors import UserError
from megavtp.study.config import StudyConfig
from megavtp.study.fits import (
    Crossing,
    Curves,
    Interval,
    Prediction,
    SeedNoise,
    crossing,
    fit_curves,
    noise_between_seeds,
    predict_largest,
)
from megavtp.study.power_law import Array

_PLACES = 40  # at which a curve is told
_DRAWN = "generation/"  # measures of a DiT's samples
_SCALARS = ("flops", "samples")  # what x may be, besides an axis


@dataclass(frozen=True)
class Point:
    """A place on a line: the mean over seeds and repetitions, how many there are, and their standard deviation."""

    x: float
    y: float
    seeds: int
    deviation: float | None  # None of a single one


@dataclass(frozen=True)
class Place:
    """A place on a curve with the interval of the curve there."""

    x: float
    y: float
    interval: Interval


@dataclass(frozen=True)
class Fit:
    """The fitted y = a (x + b)^-c + d."""

    parameters: dict[str, float]
    intervals: dict[str, Interval]
    curve: tuple[Place, ...]


@dataclass(frozen=True)
class Line:
    """The points of one measure on one line. ``left_out`` says by name what could not be computed, and why."""

    measure: str
    line: str
    points: tuple[Point, ...]
    fit: Fit | None
    predictions: tuple[Prediction, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """From where on the curve of ``line`` is better than that of ``other``."""

    measure: str
    line: str
    other: str
    crossing: Crossing


@dataclass(frozen=True)
class Fits:
    """All that the curves say; ``noise`` between seeds is by measure, as is the reason why one was left out."""

    x: str
    lines: tuple[Line, ...]
    pairs: tuple[Pair, ...]
    noise: dict[str, SeedNoise | None]
    left_out: dict[str, str]


def fit_results(study: StudyConfig, rows: Sequence[Mapping[str, Any]]) -> Fits:
    """Fit what ``study.curves`` asks for to the finished rows, as far as they allow it."""
    lines, pairs = [], []
    noise: dict[str, SeedNoise | None] = {}
    left_out = {}
    for measure, better in study.curves.better.items():
        if not any(measure in row for row in rows):
            known = sorted(name for row in rows[:1] for name in row if "/" in name and not name.startswith("chance/"))
            left_out[measure] = f"no cell has this measure; there are {', '.join(known) or 'none yet'}"
            continue
        groups = _lines(study, measure, rows)
        noise[measure] = noise_between_seeds([values for line in groups.values() for values in line.values()])
        fitted: dict[str, Curves] = {}
        for name, places in groups.items():
            lines.append(_line(study, measure, name, places, fitted))
        for one, other in permutations(fitted, 2):
            try:
                pairs.append(Pair(measure, one, other, crossing(fitted[one], fitted[other], better)))
            except UserError:  # they were looked at in different ranges, so that there is nothing to say
                continue
    return Fits(study.curves.x, tuple(lines), tuple(pairs), noise, left_out)


def _lines(
    study: StudyConfig, measure: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[float, list[float]]]:
    """Return the values of the seeds by line and place. If x is an axis, each number of steps is a line."""
    x = study.curves.x
    groups: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        drawn = measure.startswith(_DRAWN)
        if measure not in row or not drawn and row["seed"] not in (None, study.seeds[0]):
            continue  # what is measured on the tokenizer is the same for all seeds of the DiT
        names = [f"{axis}={row[axis]}" for axis in study.axes if axis not in (x, study.curves.repeats)]
        if x not in _SCALARS and len(study.looks) > 1:
            names.append(f"steps={row['steps']}")
        places = groups.setdefault(", ".join(names) or "all", {})
        places.setdefault(float(row[x]), []).append(row[measure])
    return {name: dict(sorted(places.items())) for name, places in groups.items()}


def _line(
    study: StudyConfig, measure: str, name: str, places: Mapping[float, Sequence[float]], fitted: dict[str, Curves]
) -> Line:
    """Return a line with its fit, which is added to ``fitted``, and its predictions, as far as there are points."""
    points = tuple(
        Point(x, float(np.mean(values)), len(values), float(np.std(values, ddof=1)) if len(values) > 1 else None)
        for x, values in places.items()
    )
    x, y = np.array([point.x for point in points]), np.array([point.y for point in points])
    held_out, where = study.curves.held_out, f"{measure} of {name}"
    left_out: dict[str, str] = {}
    fit, predictions = None, []
    if study.curves.x in _SCALARS and len(study.looks) == 1:
        return Line(measure, name, points, None, (), {})  # no curve was meant
    try:
        curves = fit_curves(x, y[None], name=where)
        fit = _fit(curves)
        fitted[name] = curves
    except UserError as error:
        left_out["fit"] = str(error)
    if held_out:
        try:
            predictions = predict_largest(x, y, held_out, where)
        except UserError as error:
            left_out["predictions"] = str(error)
    return Line(measure, name, points, fit, tuple(predictions), left_out)


def _fit(curves: Curves) -> Fit:
    places: Array = np.geomspace(curves.x[0], curves.x[-1], _PLACES)
    (values,), (low, high) = curves.at(places), curves.interval(places)
    return Fit(
        {name: float(value[0]) for name, value in vars(curves.fitted).items()}, curves.parameters(),
        tuple(
            Place(float(x), float(y), Interval(float(a), float(b)))
            for x, y, a, b in zip(places, values, low[0], high[0])
        ),
    )
