"""Noise on latents before they are decoded, so that the decoder forgives what a generator gets wrong.

RAE's noise-augmented decoding (arXiv 2510.11690), made part of joint training: only some images are decoded from noisy
latents, and these teach the decoder alone. An encoder that felt the noise would enlarge its latents to drown it.

Letters: b images, C channels, h = w positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.nn.seeded import named_generator


@dataclass(frozen=True)
class LatentNoise:
    """``unit`` (b, C, h, w): normal values. ``strength`` (b, 1, 1, 1): of each image, 0 where latents stay clean."""

    unit: Tensor
    strength: Tensor

    def add(self, latents: Tensor) -> Tensor:
        """Latents (b, C, h, w) plus the noise, in standard deviations that a channel has in its image.

        Noisy latents give the encoder no gradient.
        """
        still = latents.detach().float()
        spread = still.std((2, 3), correction=0, keepdim=True)
        return torch.where(self.strength > 0, still + self.strength * spread * self.unit, latents)


def draw_latent_noise(
    *, seed: int, step: int, images: Sequence[int], shape: tuple[int, int, int], strength: float, share: float
) -> LatentNoise:
    """A pure function of its arguments, of each image by itself.

    Args:
        images: places in the objective's global batch.
        shape: (C, h, w).
        strength: the highest; an image's is uniform from 0 to it.
        share: probability that an image's latents are noisy at all.
    """
    units, strengths = [], []
    for image in images:
        draw = named_generator(f"latent noise {seed} {step} {image}")
        noisy, own = torch.rand(2, generator=draw).tolist()
        units.append(torch.randn(shape, generator=draw))
        strengths.append(strength * own if noisy < share else 0.0)
    return LatentNoise(torch.stack(units), torch.tensor(strengths).view(-1, 1, 1, 1))
