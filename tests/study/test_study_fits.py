"""Curves of studies: whether their intervals hold what they promise, and the paper's own points."""

import json
from pathlib import Path

import numpy as np
import pytest

from megavtp.errors import UserError
from megavtp.study.fits import (
    Interval,
    crossings,
    difference,
    fit_curves,
    noise_between_repetitions,
    predict_largest,
)
from megavtp.study.power_law import PowerLaws, fit_power_laws

PAPER = json.loads((Path(__file__).parents[1] / "data" / "paper_figures" / "compute_scaling.json").read_text())
PLACES = np.array([1, 2, 4, 7, 12, 19, 27, 35, 40.0])
BEYOND = np.array([80.0])


def truth(rng, count, sign=1):
    return PowerLaws(
        sign * rng.uniform(20, 60, count), rng.uniform(0, 1, count), rng.uniform(0.4, 1.2, count),
        rng.uniform(10, 30, count),
    )


def share_held(x, count, seed, samples):
    rng = np.random.default_rng(seed)
    curves = truth(rng, count)
    noise = rng.uniform(0.3, 1.5, (count, 1)) * rng.standard_normal((count, len(x)))
    low, high = fit_curves(x, curves.at(x) + noise, samples=samples, seed=seed).interval(BEYOND)
    right = curves.at(BEYOND)
    return ((low <= right) & (right <= high)).mean()


def test_the_interval_at_a_place_held_out_holds_the_truth_of_95_curves_in_100():
    assert 0.93 <= share_held(PLACES, 500, 1, 150) <= 0.97


@pytest.mark.sweep
@pytest.mark.parametrize("points", [7, 9, 12, 16])
def test_so_it_does_with_few_and_with_many_points(points):
    shares = [share_held(np.geomspace(1, 40, points), 500, seed, 200) for seed in range(4)]
    assert 0.93 <= np.mean(shares) <= 0.97


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("unit", [1.0, 1e18])
def test_exact_points_give_the_parameters_falling_and_rising_in_any_unit(sign, unit):
    curves = truth(np.random.default_rng(0), 40, sign)
    found = fit_power_laws(PLACES * unit, curves.at(PLACES), np.full(40, np.inf), steps=200)
    assert np.allclose(found.at(BEYOND * unit), curves.at(BEYOND), rtol=2e-3)
    assert np.median(np.abs(found.c / curves.c - 1)) < 1e-3
    assert np.median(np.abs(found.a / curves.a / unit**curves.c - 1)) < 5e-2


def test_without_a_shift_it_equals_the_best_of_all_exponents():
    """Against plain least squares on a fine grid of exponents."""
    rng = np.random.default_rng(3)
    y = 30 * PLACES**-0.7 + 20 + rng.standard_normal(9)
    found = fit_power_laws(PLACES, y[None], np.array([np.inf]), shift=False)
    grid = np.linspace(0.1, 2, 4000)
    sums = [np.linalg.lstsq(np.stack([PLACES**-c, np.ones(9)], 1), y, rcond=None)[1][0] for c in grid]
    assert found.c[0] == pytest.approx(grid[int(np.argmin(sums))], abs=1e-3)
    assert ((found.at(PLACES)[0] - y) ** 2).sum() == pytest.approx(min(sums), rel=1e-5)


def test_an_outlier_moves_the_curve_little():
    clean = 40 * PLACES**-0.8 + 20 + 0.1 * np.random.default_rng(0).standard_normal(9)
    spoilt = clean.copy()
    spoilt[4] += 30
    robust = fit_curves(PLACES, spoilt[None], samples=10).at(PLACES)
    squares = fit_power_laws(PLACES, spoilt[None], np.array([np.inf])).at(PLACES)
    right = fit_curves(PLACES, clean[None], samples=10).at(PLACES)
    far = [np.abs(curve - right).max() for curve in (robust, squares)]
    assert far[0] < 1 and far[0] < far[1] / 5, far


@pytest.mark.parametrize("size, low, high", [("s", 0.2, 0.4), ("b", 0.1, 0.2), ("l", 0.1, 0.2)])
def test_the_papers_curves_cross_where_its_figure_has_it(size, low, high):
    """The auto-encoder's points are those of the L encoder; S and B end within 0.5 of it."""
    vtp = fit_curves(np.array(PAPER["epochs"]), np.array([PAPER[f"vtp_{size}"]]))
    alone = fit_curves(np.array(PAPER["ae_epochs"]), np.array([PAPER["ae_l"]]))
    found, back = crossings(vtp, alone, "lower")
    assert low < found.at < high
    assert found.interval.low is None or found.interval.low <= found.at
    assert found.at <= found.interval.high < 0.5 and found.never == 0
    assert back.never > 0.9, "alone it does not come out ahead"


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_the_papers_last_points_are_predicted(size):
    found = predict_largest(np.array(PAPER["epochs"]), np.array(PAPER[f"vtp_{size}"]), 2, "vtp")
    assert [point.x for point in found] == [3.5, 4.0]
    for point in found:
        assert abs(point.off) < 0.08 and point.interval.low <= point.observed <= point.interval.high
        assert point.off == pytest.approx(point.predicted / point.observed - 1)


def test_curves_that_do_not_cross_within_the_data_say_so():
    rng = np.random.default_rng(0)
    curve, noise = 30 * PLACES**-0.7 + 20, 0.05 * rng.standard_normal((2, 9))
    below, above = (fit_curves(PLACES, (curve + up + noise[i])[None]) for i, up in enumerate((0.0, 5.0)))
    for one, other, better in ((below, above, "lower"), (above, below, "higher")):
        ahead, behind = crossings(one, other, better)
        assert (ahead.at, ahead.everywhere, ahead.always) == (None, True, 1.0), better
        assert (behind.at, behind.everywhere, behind.never) == (None, False, 1.0), better
        assert ahead.interval == behind.interval == Interval(None, None)
        assert (ahead.low, ahead.high) == (behind.low, behind.high) == pytest.approx((PLACES[0], PLACES[-1]))
    assert not any(found.everywhere or found.at for found in crossings(below, below, "lower"))
    far = fit_curves(PLACES * 1000, curve[None], samples=10)
    with pytest.raises(UserError, match="no places in common"):
        crossings(below, far, "lower")


def test_a_known_crossing_is_found_within_its_interval():
    steep, flat = 60 * PLACES**-1.0 + 20, 30 + 0 * PLACES  # equal at 6
    rng = np.random.default_rng(5)
    one, other = (fit_curves(PLACES, (y + 0.3 * rng.standard_normal(9))[None]) for y in (steep, flat))
    found, _ = crossings(one, other, "lower")
    assert found.at == pytest.approx(6, rel=0.1) and found.interval.low < 6 < found.interval.high


@pytest.mark.sweep
def test_the_interval_of_a_crossing_holds_the_truth():
    rng, held = np.random.default_rng(7), []
    for _ in range(200):
        power, level = rng.uniform(0.6, 1.2), rng.uniform(27, 35)
        right = (60 / (level - 20)) ** (1 / power)
        steep, flat = 60 * PLACES**-power + 20, level + 0 * PLACES
        one, other = (fit_curves(PLACES, (y + 0.5 * rng.standard_normal(9))[None], samples=300) for y in (steep, flat))
        ends = crossings(one, other, "lower")[0].interval
        held.append((ends.low is None or ends.low <= right) and (ends.high is None or right <= ends.high))
    assert 0.93 <= np.mean(held) <= 0.99


def test_a_value_of_zero_has_no_share_to_be_off_by():
    (found,) = predict_largest(PLACES, np.array([1, 0.5, 0.3, 0.2, 0.1, 0.1, 0.05, 0.02, 0.0]), 1, "recall")
    assert found.off is None and found.observed == 0


def test_too_few_points_are_one_line():
    with pytest.raises(UserError, match="the curve: 3 points, a fit needs 4 at different places"):
        fit_curves(PLACES[:3], np.ones((1, 3)))
    with pytest.raises(UserError, match="objectives=ae without its 2 largest: 3 points, a fit needs 4"):
        predict_largest(PLACES[:5], np.ones(5), 2, "objectives=ae")
    with pytest.raises(UserError, match="lies at 0; a power law needs places above 0"):
        fit_curves(PLACES - 1, np.ones((1, 9)))


def test_four_points_do_and_parameters_have_intervals():
    y = 30 * PLACES[:4] ** -0.7 + 20 + np.array([0.1, -0.1, 0.1, 0])
    curves = fit_curves(PLACES[:4], y[None])
    ends = curves.parameters()
    assert curves.fitted.b[0] == 0 and ends["b"] == Interval(0, 0)
    assert ends["c"].low < curves.fitted.c[0] < ends["c"].high
    again = fit_curves(PLACES[:4], y[None])
    assert np.array_equal(curves.samples.a, again.samples.a)


def test_noise_between_repetitions_is_the_pooled_deviation():
    found = noise_between_repetitions([[1.0, 3.0], [10.0], [5.0, 5.0, 8.0]])
    assert found.deviation == pytest.approx(np.sqrt((2 + 6) / 3)) and (found.places, found.freedom) == (2, 3)
    assert noise_between_repetitions([[1.0], [2.0]]) is None


def test_the_interval_of_a_difference_is_students():
    """Of five and many values it is the t test's of four degrees of freedom; of two and two it holds the truth."""
    few, many = [1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 500 + [1e-6]
    found = difference(few, many)
    half = 2.776 * np.std(few, ddof=1) / 5**0.5  # the quantile from a table
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=0.01)
    rng = np.random.default_rng(3)
    ends = [difference(*rng.standard_normal((2, 2))) for _ in range(300)]
    assert np.mean([end.low <= 0 <= end.high for end in ends]) >= 0.93
    assert difference([1.0], few) is None
