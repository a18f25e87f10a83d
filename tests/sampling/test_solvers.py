"""Solvers against a flow whose exact solution is known, from noise N(0, 1) to data N(m, s^2)."""

import math

import pytest
import torch

from megavtp.dit.sampling.settings import SamplingSettings
from megavtp.dit.sampling.solvers import dopri5, euler, euler_maruyama, heun
from megavtp.errors import UserError

MEAN, STD = 0.7, 0.3
NO_CONDITION = torch.zeros(4)


def velocity(x, t, y):
    """E[data - noise | x_t = x] of x_t = t data + (1 - t) noise."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


class Counted:
    """The velocity, and how often it was asked for."""

    calls = 0

    def __call__(self, x, t, y):
        self.calls += 1
        return velocity(x, t, y)


def noise(samples=4):
    return torch.randn(samples, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(x):
    """The flow keeps quantiles."""
    return MEAN + STD * x


def error(solution, start):
    return (solution - exact(start)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("method, order", [(euler, 1), (heun, 2)])
def test_the_error_falls_with_the_order(method, order, shift):
    x = noise()
    errors = [
        error(method(velocity, x, NO_CONDITION, SamplingSettings(steps=steps, shift=shift).times()), x)
        for steps in (100, 200, 400)
    ]
    observed = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(o - order) < 0.2 for o in observed), observed
    assert errors[-1] < 0.02


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-7])
def test_dopri5_keeps_its_tolerance(rtol):
    x, counted = noise(), Counted()
    # in several steps, and not the mean but the largest
    assert error(dopri5(counted, x, NO_CONDITION, rtol, 1e-2 * rtol), x) < 20 * rtol
    assert counted.calls < 400


def test_dopri5_is_of_fifth_order():
    """Work grows by the fifth root of the accuracy."""
    counts = []
    for rtol in (1e-5, 1e-10):
        counted = Counted()
        dopri5(counted, noise(1), NO_CONDITION[:1], rtol, rtol)
        counts.append(counted.calls)
    assert 4 < counts[1] / counts[0] < 14  # ten would be the fifth root of 1e5


def test_a_sample_takes_the_same_steps_in_any_batch():
    """Rates differ by row, so that rows end at different times; they come back in their places."""
    x, rates = noise(), torch.tensor([0.1, 30.0, 3.0, 1.0], dtype=torch.float64)
    times = [[] for _ in rates]

    def field(x, t, y):
        for rate, moment in zip(y.tolist(), t.tolist()):
            times[rates.tolist().index(rate)].append(moment)
        return -y.view(-1, 1, 1, 1) * x

    together = dopri5(field, x, rates, 1e-6, 1e-8)
    in_batch, times[:] = [list(t) for t in times], [[] for _ in rates]
    alone = torch.cat([dopri5(field, x[i : i + 1], rates[i : i + 1], 1e-6, 1e-8) for i in range(4)])
    assert torch.equal(together, alone) and times == in_batch
    assert len(set(map(len, times))) == 4
    assert torch.allclose(together, x * torch.exp(-rates).view(-1, 1, 1, 1), atol=1e-5)


def test_dopri5_refuses_what_is_not_finite():
    with pytest.raises(UserError, match="dopri5 gets nowhere"):
        dopri5(lambda x, t, y: x * math.nan, noise(), NO_CONDITION, 1e-3, 1e-6)


@pytest.mark.parametrize("diffusion", [0.3, 1.0, 2.0])
def test_the_sde_has_the_marginals_of_the_data(diffusion):
    x = torch.randn(200, 1, 20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = torch.Generator().manual_seed(2)
    end = euler_maruyama(
        velocity, x, torch.zeros(200), SamplingSettings(steps=100).times(), diffusion,
        lambda: torch.randn(x.shape, generator=draws, dtype=torch.float64),
    )
    count = x.numel()  # five standard errors, and the steps' bias
    assert abs(end.mean() - MEAN) < 5 * STD / count**0.5 + 0.003
    assert abs(end.std() - STD) < 5 * STD / (2 * count) ** 0.5 + 0.008
    # not the deterministic flow: what a sample began with is partly forgotten
    correlation = torch.corrcoef(torch.stack([x.flatten(), end.flatten()]))[0, 1]
    assert correlation < {0.3: 0.8, 1.0: 0.4, 2.0: 0.15}[diffusion]


def test_the_sde_without_noise_is_the_flow():
    x, times = noise(), SamplingSettings(steps=20).times()
    silent = euler_maruyama(velocity, x, NO_CONDITION, times, 0.0, lambda: torch.full_like(x, 5.0))
    assert torch.equal(silent, euler(velocity, x, NO_CONDITION, times))


def test_times():
    assert SamplingSettings(steps=4).times() == [0, 0.25, 0.5, 0.75, 1]
    assert len(SamplingSettings().times()) == 251
    shifted = SamplingSettings(steps=2, shift=0.5).times()
    assert shifted[0] == 0 and shifted[2] == 1 and shifted[1] == pytest.approx(0.25 / 0.75)


@pytest.mark.parametrize("wrong, text", [
    ({"method": "rk4"}, "method rk4"), ({"steps": 0}, "steps 0"), ({"shift": 0.0}, "shift 0"),
    ({"guidance": -1.0}, "guidance -1"), ({"interval": (0.5, 0.1)}, "interval 0.5,0.1"),
    ({"guided_channels": 0}, "guided channels 0"), ({"method": "dopri5", "steps": 9}, "dopri5 chooses its steps"),
    ({"method": "dopri5", "shift": 0.3}, "dopri5 chooses its steps"), ({"diffusion": -1.0}, "diffusion"),
    ({"rtol": 0.0}, "rtol"),
])
def test_settings_that_make_no_sense(wrong, text):
    with pytest.raises(UserError, match=text):
        SamplingSettings(**wrong)
