"""Curves through the results of a study: one for each measure and line, where a line has one choice on each axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from megavtp.errors import UserError
from megavtp.study.config import StudyConfig
from megavtp.study.fits import (
    Crossing,
    Curves,
    Interval,
    Noise,
    Prediction,
    crossings,
    fit_curves,
    noise_between_repetitions,
    predict_largest,
)
from megavtp.study.power_law import Array

_PLACES = 40  # at which a curve is told
_DRAWN = "generation/"  # measures of a DiT's samples
_SCALARS = ("flops", "samples")  # what x may be, besides an axis


@dataclass(frozen=True)
class Point:
    """A place on a line: the mean ``y`` of the ``values`` of its repetitions."""

    x: float
    y: float
    values: tuple[float, ...]


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
    """All that the curves say.

    By measure: the ``noise`` between repetitions, the cells of which a number is ``missing`` though others have one,
    and the reason why the measure was left out.
    """

    x: str
    lines: tuple[Line, ...]
    pairs: tuple[Pair, ...]
    noise: dict[str, Noise | None]
    missing: dict[str, tuple[str, ...]]
    left_out: dict[str, str]


def fit_results(study: StudyConfig, rows: Sequence[Mapping[str, Any]]) -> Fits:
    """Fit what ``study.curves`` asks for to the finished rows, as far as they allow it."""
    lines, pairs = [], []
    noise: dict[str, Noise | None] = {}
    missing, left_out = {}, {}
    for measure, better in study.curves.better.items():
        if not any(measure in row for row in rows):
            known = sorted(name for row in rows[:1] for name in row if "/" in name and not name.startswith("chance/"))
            left_out[measure] = f"no cell has this measure; there are {', '.join(known) or 'none yet'}"
            continue
        if without := tuple(row["cell"] for row in rows if measure not in row):
            missing[measure] = without
        groups = _lines(study, measure, rows)
        noise[measure] = noise_between_repetitions([values for line in groups.values() for values in line.values()])
        fitted: dict[str, Curves] = {}
        for name, places in groups.items():
            lines.append(_line(study, measure, name, places, fitted))
        for one, other in combinations(fitted, 2):
            try:
                there, back = crossings(fitted[one], fitted[other], better)
            except UserError:  # they were looked at in different ranges, so that there is nothing to say
                continue
            pairs += [Pair(measure, one, other, there), Pair(measure, other, one, back)]
    return Fits(study.curves.x, tuple(lines), tuple(pairs), noise, missing, left_out)


def _lines(
    study: StudyConfig, measure: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[float, list[float]]]:
    """Return the values of the repetitions by line and place. If x is an axis, each number of steps is a line."""
    x, repeats = study.curves.x, study.curves.repeats
    groups: dict[str, dict[float, dict[Any, list[float]]]] = {}
    for row in rows:
        if measure not in row:
            continue
        names = [f"{axis}={row[axis]}" for axis in study.axes if axis not in (x, repeats)]
        if x not in _SCALARS and len(study.looks) > 1:
            names.append(f"steps={row['steps']}")
        place = groups.setdefault(", ".join(names) or "all", {}).setdefault(float(row[x]), {})
        place.setdefault(row[repeats or "seed"], []).append(row[measure])
    return {
        name: {place: _independent(measure, values) for place, values in sorted(places.items())}
        for name, places in groups.items()
    }


def _independent(measure: str, repetitions: Mapping[Any, Sequence[float]]) -> list[float]:
    """Return the values that count as draws of their own.

    A repetition's mean over the seeds of its DiT is one. Equal ones of a tokenizer are one number told several times,
    as for each seed of the DiT; those of samples, which each repetition draws anew, are equal by chance.
    """
    means = [float(np.mean(values)) for values in repetitions.values()]
    return means[:1] if len(set(means)) == 1 and not measure.startswith(_DRAWN) else means


def _line(
    study: StudyConfig, measure: str, name: str, places: Mapping[float, Sequence[float]], fitted: dict[str, Curves]
) -> Line:
    """Return a line with its fit, which is added to ``fitted``, and its predictions, as far as there are points."""
    points = tuple(Point(x, float(np.mean(values)), tuple(values)) for x, values in places.items())
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
