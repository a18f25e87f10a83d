"""Noise on latents before decoding makes the decoder robust to the errors of a generator.

This is RAE's noise-augmented decoding (arXiv 2510.11690) as a part of joint training: only some images are decoded
from noisy latents, and these train the decoder alone. An encoder that got their gradient would enlarge its latents to
drown the noise.

Letters: b images, C channels, h = w positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.nn.seeded import named_generator


@dataclass(frozen=True)
class LatentNoise:
    """``unit`` (b, C, h, w) has normal values; ``strength`` (b, 1, 1, 1) is per image, 0 where latents stay clean."""

    unit: Tensor
    strength: Tensor

    def add(self, latents: Tensor) -> Tensor:
        """Add the noise to latents (b, C, h, w), in units of each channel's standard deviation in its image.

        Noisy latents give the encoder no gradient.
        """
        still = latents.detach().float()
        spread = still.std((2, 3), correction=0, keepdim=True)
        return torch.where(self.strength > 0, still + self.strength * spread * self.unit, latents)


def draw_latent_noise(
    *, seed: int, step: int, images: Sequence[int], shape: tuple[int, int, int], strength: float, share: float
) -> LatentNoise:
    """Draw the noise as a pure function of the arguments, for each image on its own.

    Args:
        images: places of the images in the objective's global batch.
        shape: (C, h, w).
        strength: the highest strength; an image's is uniform between 0 and this.
        share: probability that an image's latents are noisy at all.
    """
    units, strengths = [], []
    for image in images:
        draw = named_generator(f"latent noise {seed} {step} {image}")
        noisy, own = torch.rand(2, generator=draw).tolist()
        units.append(torch.randn(shape, generator=draw))
        strengths.append(strength * own if noisy < share else 0.0)
    return LatentNoise(torch.stack(units), torch.tensor(strengths).view(-1, 1, 1, 1))
