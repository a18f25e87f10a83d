import math

import pytest

from megavtp.config.run import OptimizerConfig
from megavtp.training.schedules import cosine, learning_rate, linear_warmup


def rates(count, steps, warmup, peak, floor, cooldown=None):
    settings = OptimizerConfig(warmup_steps=warmup, lr=peak, min_lr=floor, cooldown=cooldown)
    return [learning_rate(step, steps, settings) for step in range(count)]


def test_cosine_ends_middle_and_beyond():
    assert cosine(0, 100, 0.992, 1.0) == pytest.approx(0.992)
    assert cosine(50, 100, 0.0, 1.0) == pytest.approx(0.5)
    assert cosine(25, 100, 0.0, 1.0) == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 4))
    assert cosine(100, 100, 0.992, 1.0) == 1.0
    assert cosine(10**6, 100, 0.992, 1.0) == 1.0


def test_constant_stays_exactly_constant():
    assert {cosine(step, 7, 0.994, 0.994) for step in range(9)} == {0.994}
    assert {linear_warmup(step, 7, 0.07, 0.07) for step in range(9)} == {0.07}


def test_linear_warmup():
    values = [linear_warmup(step, 4, 0.04, 0.08) for step in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08])
    assert linear_warmup(0, 0, 0.04, 0.07) == 0.07


def test_warmup_cosine_shape():
    values = rates(25, 20, 5, 1.0, 0.1)
    assert values[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert all(a > b for a, b in zip(values[5:20], values[6:21]))
    assert values[20:] == [0.1] * 5
    assert values[5 + 5] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 3)))


@pytest.mark.parametrize(
    "steps,warmup,expected",
    [
        (1, 0, [2.0]),
        (1, 1, [2.0]),
        (4, 0, [2.0, 1 + 1 / math.sqrt(2), 1.0, 1 - 1 / math.sqrt(2)]),
        (3, 3, [2 / 3, 4 / 3, 2.0]),
        (2, 4, [0.5, 1.0]),
    ],
)
def test_warmup_cosine_edges(steps, warmup, expected):
    assert rates(steps, steps, warmup, 2.0, 0.0) == pytest.approx(expected)


def test_warmup_hold_shape():
    values = rates(25, 20, 5, 1.0, 0.1, cooldown=0.25)
    assert values[:16] == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 12)
    assert values[16:20] == pytest.approx([0.82, 0.64, 0.46, 0.28])  # a straight line that would reach 0.1 at step 20
    assert values[20:] == pytest.approx([0.1] * 5)


@pytest.mark.parametrize("cooldown,last", [(0.0, 2.0), (1.0, 0.5)])
def test_warmup_hold_edges(cooldown, last):
    found = rates(4, 4, 0, 2.0, 0.0, cooldown)
    assert found[0] == 2.0 and found[3] == pytest.approx(last)


def test_cooldown_chooses_the_schedule():
    held = OptimizerConfig(lr=1.0, warmup_steps=0, cooldown=0.2)
    assert learning_rate(50, 100, held) == 1.0
    assert learning_rate(50, 100, OptimizerConfig(lr=1.0, warmup_steps=0)) == pytest.approx(0.5)
