"""On latents whose best velocity is known in closed form, a DiT learns it, by the pass that training runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megavtp.config.share import PassShare
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import DiTConfig, DiTModelConfig, FlowMatchingConfig
from megavtp.dit.flow_matching import FlowMatchingPass, straight_path
from megavtp.dit.model.build import build_averaged_dit
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import execute

MEANS, STDS = torch.tensor([1.0, -0.5]), torch.tensor([0.4, 0.8])  # of the two classes' Gaussian latents
SHAPE = (2, 2, 2)
STEPS, BATCH = 400, 128
TOLERANCE = 0.01  # of the optimum
# The mean velocity is the optimum of the squared error alone.
CONFIG = DiTConfig(
    model=DiTModelConfig(width=48, depth=2, heads=2, latent_size=2, latent_channels=2, num_classes=2),
    flow_matching=FlowMatchingConfig(cosine_weight=0.0),
)


class Runner:
    """A plain module in the engine's place."""

    mesh = SINGLE

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, mode: str, **inputs: Tensor) -> Tensor:
        return self.model(mode, **inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def draw(step: int, count: int, generator: torch.Generator) -> LatentBatch:
    labels = torch.randint(2, (count,), generator=generator)
    data = torch.randn(count, *SHAPE, generator=generator)
    data = MEANS[labels].view(-1, 1, 1, 1) + STDS[labels].view(-1, 1, 1, 1) * data
    noise = torch.randn(count, *SHAPE, generator=generator)
    times = torch.sigmoid(torch.randn(count, generator=generator))
    return LatentBatch(step, [], torch.arange(count), data, noise, times, labels)


def best_velocity(points: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """E[data - noise | point]: both are Gaussian, so it is linear in the point."""
    m, s, t = (x.view(-1, 1, 1, 1) for x in (MEANS[labels], STDS[labels], times))
    covariance, variance = t * s**2 - (1 - t), t**2 * s**2 + (1 - t) ** 2
    return m + covariance / variance * (points - t * m)


def test_reaches_the_known_optimum():
    model, generator = build_averaged_dit(CONFIG.model), torch.Generator().manual_seed(0)
    flow = FlowMatchingPass(CONFIG, PassShare(BATCH, BATCH, BATCH), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.dit.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        execute(flow, Runner(model), draw(step, BATCH, generator))
        optimizer.step()
        schedule.step()
        for average, trained in model.averaged():
            average.data.lerp_(trained.data, 0.05)
    batch = draw(STEPS, 20_000, generator)
    times, labels = batch.times, batch.conditions
    points, target = straight_path(batch.latents, batch.noise, times)
    best = best_velocity(points, times, labels)
    with torch.no_grad():
        error = (model("average", x=points, t=times, y=labels) - best).square().mean()
    s, t = STDS[labels], times
    optimum = (s**2 / (t**2 * s**2 + (1 - t) ** 2)).mean()  # the velocity's variance given the point
    torch.testing.assert_close((best - target).square().mean(), optimum, rtol=0.02, atol=0.0)
    print(f"optimum {optimum:.4f}, above it {error:.4f}")
    assert error < TOLERANCE * optimum
