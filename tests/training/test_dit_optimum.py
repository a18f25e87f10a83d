"""On latents whose best velocity is known in closed form, a DiT learns it."""

from __future__ import annotations

import torch
from torch import Tensor

from megavtp.config.dit import DiTModelConfig
from megavtp.models.dit_average import build_averaged_dit
from megavtp.objectives.flow_matching import flow_matching_terms, straight_path

MEANS, STDS = torch.tensor([1.0, -0.5]), torch.tensor([0.4, 0.8])  # of the two classes' Gaussian latents
SHAPE = (2, 2, 2)
STEPS, BATCH = 400, 128
TOLERANCE = 0.01  # of the optimum


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, times and labels of a batch."""
    labels = torch.randint(2, (count,), generator=generator)
    data = torch.randn(count, *SHAPE, generator=generator)
    data = MEANS[labels].view(-1, 1, 1, 1) + STDS[labels].view(-1, 1, 1, 1) * data
    noise = torch.randn(count, *SHAPE, generator=generator)
    return data, noise, torch.sigmoid(torch.randn(count, generator=generator)), labels


def best_velocity(points: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """E[data - noise | point]: both are Gaussian, so it is linear in the point."""
    m, s, t = (x.view(-1, 1, 1, 1) for x in (MEANS[labels], STDS[labels], times))
    covariance, variance = t * s**2 - (1 - t), t**2 * s**2 + (1 - t) ** 2
    return m + covariance / variance * (points - t * m)


def test_reaches_the_known_optimum():
    config = DiTModelConfig(width=48, depth=2, heads=2, latent_size=2, latent_channels=2, num_classes=2)
    model, generator = build_averaged_dit(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.dit.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        data, noise, times, labels = draw(BATCH, generator)
        points, target = straight_path(data, noise, times)
        velocity = model("velocity", x=points, t=times, y=labels)
        optimizer.zero_grad()
        flow_matching_terms(velocity, target, samples_total_local=BATCH)["mse"].backward()
        optimizer.step()
        schedule.step()
        for average, trained in model.averaged():
            average.data.lerp_(trained.data, 0.05)
    data, noise, times, labels = draw(20_000, generator)
    points, target = straight_path(data, noise, times)
    best = best_velocity(points, times, labels)
    with torch.no_grad():
        error = (model("average", x=points, t=times, y=labels) - best).square().mean()
    s, t = STDS[labels], times
    optimum = (s**2 / (t**2 * s**2 + (1 - t) ** 2)).mean()  # the velocity's variance given the point
    torch.testing.assert_close((best - target).square().mean(), optimum, rtol=0.02, atol=0.0)
    print(f"optimum {optimum:.4f}, above it {error:.4f}")
    assert error < TOLERANCE * optimum
