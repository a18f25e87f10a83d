"""Curves through the points of a study: intervals, predictions of points held out, and where two curves cross.

All intervals are of 95 %. A curve is fitted again to many bootstrap samples: the fitted values plus residuals that are
drawn anew. Few points leave the noise itself uncertain, so each sample draws its size, too, as the chi-square
distribution has it; without that, intervals of fewer than some twenty points are too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megavtp.errors import UserError
from megavtp.study.power_law import Array, PowerLaws, fit_power_laws

Better = Literal["lower", "higher"]
LEAST_POINTS = 4  # three parameters and one point to judge them by
_POINTS_FOR_SHIFT = 6  # with fewer, b is 0
TAIL = 0.025  # of a bootstrap, beyond each end of an interval
_ENDS = (TAIL, 1 - TAIL)
_HUBER = 2.0  # standard deviations of the noise from which on a point counts less
_NORMAL_MEDIAN = 1.4826  # standard deviations in a median absolute deviation of normal noise
_ROUNDS = 3  # of fitting and estimating the noise
_DRAWS = 200_000  # of a difference
_GRID = 1000  # places between the ends of the data, where a crossing is looked for


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high``; None is an end that the data leave open."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curves:
    """m curves through points at the same places, with their bootstrap.

    Attributes:
        x: places (n,), ascending.
        fitted: the m curves.
        samples: the m * r refits, those of a curve one after the other.
        noise: (m, r * n), residuals as the bootstrap drew them.
    """

    x: Array
    fitted: PowerLaws
    samples: PowerLaws
    noise: Array

    def at(self, x: Array) -> Array:
        """Return the values (m, k) at places (k,)."""
        return self.fitted.at(x)

    def sampled(self, x: Array) -> Array:
        """Return the values (m, r, k) of the refits."""
        return self.samples.at(x).reshape(len(self.fitted.a), -1, len(x))

    def interval(self, x: Array) -> tuple[Array, Array]:
        """Return the ends (m, k) of the curve's interval at each place by itself."""
        low, high = np.quantile(self.sampled(x), _ENDS, axis=1, method="weibull")
        return low, high

    def interval_of_points(self, x: Array) -> tuple[Array, Array]:
        """Return the ends (m, k) between which a further point, with its own noise, is expected."""
        values = self.sampled(x)
        low, high = np.quantile(values + self.noise[:, : values.shape[1], None], _ENDS, axis=1, method="weibull")
        return low, high

    def parameters(self) -> dict[str, Interval]:
        """Return the intervals of the first curve's parameters a, b, c and d."""
        count = len(self.samples.a) // len(self.fitted.a)
        ends = {name: np.quantile(values[:count], _ENDS) for name, values in vars(self.samples).items()}
        return {name: Interval(float(low), float(high)) for name, (low, high) in ends.items()}


def fit_curves(
    x: Array, y: Array, *, name: str = "the curve", samples: int = 1000, seed: int = 0
) -> Curves:
    """Fit curves to points at ascending places (n,) with values (m, n), each by itself.

    With fewer than 6 points b is 0. Raises UserError, which names the curve, for fewer than 4 points.
    """
    _check_points(x, name)
    rng = np.random.default_rng(seed)
    curves, points = y.shape
    shift = points >= _POINTS_FOR_SHIFT
    left = points - (4 if shift else 3)
    fitted = fit_power_laws(x, y, np.full(curves, np.inf), shift=shift)
    for _ in range(_ROUNDS):
        # The noise by the median, which outliers do not move. As many of the smallest residuals as there are parameters
        # but one are left out: a fit makes some small.
        sizes = np.sort(np.abs(y - fitted.at(x)), axis=1)[:, points - left - 1 :]
        delta = _HUBER * _NORMAL_MEDIAN * np.median(sizes, axis=1) + 1e-9 * np.abs(y).max(axis=1) + 1e-300
        fitted = fit_power_laws(x, y, delta, shift=shift, start=fitted)
    residuals = (y - fitted.at(x)) * np.sqrt(points / left)
    drawn = rng.integers(0, points, (curves, samples, points))
    size = np.sqrt(left / rng.chisquare(left, (curves, samples, 1)))
    noise = np.take_along_axis(residuals[:, None, :], drawn, axis=2) * size
    values = (fitted.at(x)[:, None, :] + noise).reshape(-1, points)
    own = np.repeat(np.arange(curves), samples)
    refits = fit_power_laws(x, values, delta[own], shift=shift, start=fitted[own], steps=15)
    return Curves(x, fitted, refits, noise.transpose(0, 2, 1).reshape(curves, -1))


def _check_points(x: Array, name: str) -> None:
    """Raise UserError if there are too few places for a curve of this name, or one is not positive."""
    if len(x) < LEAST_POINTS:
        raise UserError(
            f"{name}: {len(x)} point{'s' if len(x) != 1 else ''}, a fit needs {LEAST_POINTS} at different places; look "
            "at more points, or hold out fewer"
        )
    if x[0] <= 0 or not np.isfinite(x).all():
        raise UserError(f"{name}: a point lies at {x[0]:g}; a power law needs places above 0")


@dataclass(frozen=True)
class Prediction:
    """A point that was held out: what the others predict, the interval for such a point, and what was found.

    ``off`` is the prediction over the observed value, less 1; None if that value is 0.
    """

    x: float
    predicted: float
    interval: Interval
    observed: float
    off: float | None


def predict_largest(x: Array, y: Array, held_out: int, name: str) -> list[Prediction]:
    """Predict the ``held_out`` largest of the points x, y (n,) from the others. UserError: these are too few."""
    kept = max(len(x) - held_out, 0)
    curves = fit_curves(x[:kept], y[None, :kept], name=f"{name} without its {held_out} largest")
    (values,), ends = curves.at(x[kept:]), curves.interval_of_points(x[kept:])
    return [
        Prediction(
            float(place), float(value), Interval(float(low), float(high)), float(seen),
            float(value / seen - 1) if seen else None,
        )
        for place, value, low, high, seen in zip(x[kept:], values, ends[0][0], ends[1][0], y[kept:])
    ]


@dataclass(frozen=True)
class Crossing:
    """From where on one curve is the better one, up to the end of the data that both have.

    Attributes:
        at: None if it is so everywhere, or not at the end.
        everywhere: whether it is so everywhere.
        interval: of ``at``; an end is None if it lies outside of the data.
        always, never: shares of the bootstrap in which the curve is better everywhere, and not at the end.
        low, high: the ends of the places that both have.
    """

    at: float | None
    everywhere: bool
    interval: Interval
    always: float
    never: float
    low: float
    high: float


def crossings(one: Curves, other: Curves, better: Better) -> tuple[Crossing, Crossing]:
    """Find from where on the first curve of ``one`` is better than that of ``other``, and the other way round.

    Where both have equally many points, their bootstraps draw the same places and sizes of noise: they are paired.
    UserError: they have no stretch of places in common.
    """
    low, high = max(one.x[0], other.x[0]), min(one.x[-1], other.x[-1])
    if low >= high:
        raise UserError("two curves have no places in common, where they could cross; look at both in one range")
    grid = np.geomspace(low, high, _GRID)
    sign = 1 if better == "lower" else -1
    lead = sign * (other.at(grid) - one.at(grid))
    leads = sign * (other.sampled(grid)[0] - one.sampled(grid)[0])
    return _crossing(grid, lead, leads), _crossing(grid, -lead, -leads)


def _crossing(grid: Array, lead: Array, leads: Array) -> Crossing:
    """Describe a curve's ``lead`` (1, k) over another one at the places ``grid`` (k,), and its bootstrap (r, k)."""
    (at,), places = _better_from(grid, lead), _better_from(grid, leads)
    ends = np.quantile(places, _ENDS, method="nearest")  # nothing lies between a place and infinity
    return Crossing(
        float(at) if np.isfinite(at) else None, bool(at == -np.inf),
        Interval(*(float(end) if np.isfinite(end) else None for end in ends)),
        float(np.mean(places == -np.inf)), float(np.mean(places == np.inf)), float(grid[0]), float(grid[-1]),
    )


def _better_from(grid: Array, lead: Array) -> Array:
    """Return the place (m,) after the last one where a ``lead`` (m, k) is negative: -inf if none is, inf at the end."""
    behind = lead <= 0
    last = lead.shape[1] - 1 - behind[:, ::-1].argmax(axis=1)
    inside = np.minimum(last, lead.shape[1] - 2)
    rows = np.arange(len(lead))
    before, after = lead[rows, inside], lead[rows, inside + 1]
    share = np.clip(before / np.minimum(before - after, -1e-300), 0, 1)
    place = grid[inside] * (grid[inside + 1] / grid[inside]) ** share
    return np.where(behind.any(axis=1), np.where(behind[:, -1], np.inf, place), -np.inf)


@dataclass(frozen=True)
class Noise:
    """The standard deviation between repetitions at ``places`` places, with ``freedom`` degrees of freedom."""

    deviation: float
    places: int
    freedom: int


def noise_between_repetitions(groups: Sequence[Sequence[float]]) -> Noise | None:
    """Pool the variance within groups of repeated values; None if nothing was repeated."""
    repeated = [np.asarray(group, dtype=float) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    if not freedom:
        return None
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in repeated)
    return Noise(float(np.sqrt(squares / freedom)), len(repeated), freedom)


def difference(one: Sequence[float], other: Sequence[float]) -> Interval | None:
    """Return the interval of the difference of the means that repeated values were drawn from; None if one has no two.

    Each mean is uncertain as Student's t distribution has it (the solution of Behrens and Fisher), here by drawing.
    """
    if min(len(one), len(other)) < 2:
        return None
    rng = np.random.default_rng(0)
    means = [
        np.mean(values) + np.std(values, ddof=1) / len(values) ** 0.5 * rng.standard_t(len(values) - 1, _DRAWS)
        for values in (one, other)
    ]
    low, high = np.quantile(means[0] - means[1], _ENDS)
    return Interval(float(low), float(high))
