"""Sampling with the official weights equals what LightningDiT's own code returns (CPU, float32)."""

import pytest
import torch
from dit_oracle import official_dit, stored

from megavtp.dit.sampling.guidance import guided_field
from megavtp.dit.sampling.settings import SamplingSettings
from megavtp.dit.sampling.solvers import dopri5, euler, euler_maruyama


@pytest.fixture(scope="module")
def official():
    return stored("sampling")


@pytest.fixture(scope="module")
def dit():
    return official_dit().eval()


@pytest.mark.parametrize("points, shift", [(10, 0), (10, 0.3), (250, 0.075)])
@torch.no_grad()
def test_euler_and_its_times(dit, official, points, shift):
    name = f"ode/euler{points}" + (f"_shift{shift}" if shift else "")
    times = SamplingSettings(steps=points - 1, shift=shift or 1.0).times()
    assert torch.allclose(torch.tensor(times), official[f"{name}/grid"], atol=5e-7)
    end = euler(guided_field(dit), official["z"], official["yz"], times)
    assert torch.allclose(end, official[f"{name}/final"], atol=2e-5)


@torch.no_grad()
def test_guided_euler(dit, official):
    field = guided_field(dit, 4.0, (0.11, 1.0), channels=3)
    end = euler(field, official["z"], official["yz"], SamplingSettings(steps=9, shift=0.3).times())
    assert torch.allclose(end, official["ode/cfg4_interval0.11_euler10_shift0.3/final"], atol=2e-5)


@torch.no_grad()
def test_dopri5(dit, official):
    """The official run has the tolerance 1e-3, which is how far it is from the solution."""
    z, y = official["z"], official["yz"]
    exact = dopri5(guided_field(dit), z, y, 1e-6, 1e-7)
    assert torch.allclose(dopri5(guided_field(dit), z, y, 1e-3, 1e-6), exact, atol=5e-3)
    assert torch.allclose(official["ode/dopri5_5/final"], exact, atol=5e-3)


@torch.no_grad()
def test_sde(dit, official):
    """Euler-Maruyama with the diffusion sigma(t) to t = 0.96, then one step along the drift alone."""
    times = [*torch.linspace(0, 0.96, 12).tolist(), 1.0]
    draws = torch.Generator().manual_seed(15)
    z = official["z"]
    end = euler_maruyama(
        guided_field(dit), z, official["yz"], times, 1.0, lambda: torch.randn(z.shape, generator=draws)
    )
    assert torch.allclose(end, official["sde/Euler_sigma_12_seed15/final"], atol=1e-5)


@pytest.mark.parametrize("name, time, start", [
    ("cfg3_t0.05", 0.05, 0.11), ("cfg3_t0.05_nointerval", 0.05, 0.0), ("cfg3_t0.6", 0.6, 0.11),
])
@torch.no_grad()
def test_guidance_of_three_channels(dit, official, name, time, start):
    """The official batch is the samples twice, with their labels and with none."""
    x, y, t = official["cfg/x"][:2], official["cfg/y"][:2], torch.full((2,), time, dtype=torch.float64)
    velocity = guided_field(dit, 3.0, (start, 1.0), channels=3)(x, t, y)
    assert torch.allclose(velocity, official[f"cfg/{name}"][:2], atol=2e-5)


@torch.no_grad()
def test_guidance_of_all_channels_and_rows_of_different_times(dit, official):
    x, y = official["cfg/x"], torch.tensor([1, 2, 3, 4])
    t = torch.tensor([0.05, 0.2, 0.7, 0.95], dtype=torch.float64)
    with_class = dit(x, t.float(), y)
    without = dit(x, t.float(), torch.full((4,), 10))
    velocity = guided_field(dit, 2.5, (0.2, 0.7))(x, t, y)
    guided = torch.tensor([False, True, True, False])[:, None, None, None]
    expected = torch.where(guided, without + 2.5 * (with_class - without), with_class)
    assert torch.allclose(velocity, expected, atol=2e-5)
    assert (velocity[1] - with_class[1]).abs().max() > 0.01


@torch.no_grad()
def test_outside_of_the_interval_nothing_is_computed_twice(dit, official):
    sizes = []

    class Counted:
        no_condition = dit.no_condition

        def __call__(self, x, t, y):
            sizes.append(len(x))
            return dit(x, t, y)

    x, y = official["cfg/x"], torch.tensor([1, 2, 3, 4])
    for scale, t in ((1.0, 0.5), (3.0, 0.05), (3.0, 0.5)):
        guided_field(Counted(), scale, (0.1, 1.0))(x, torch.full((4,), t, dtype=torch.float64), y)
    assert sizes == [4, 4, 8]
