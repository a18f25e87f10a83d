"""The two pixel formats and the way between them.

Stored and displayed: uint8 in 0..255. In the models: float, normalised per channel with the ImageNet statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

Channels = tuple[float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(
    image: Tensor, dtype: torch.dtype = torch.float32, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD
) -> Tensor:
    """uint8 (..., 3, H, W) in 0..255 -> ``dtype`` (..., 3, H, W), normalised per channel."""
    return _per_channel(image.to(dtype), [(1 / (255 * s), -m / s) for m, s in zip(mean, std)])


def denormalise(image: Tensor, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD) -> Tensor:
    """Normalised float (..., 3, H, W) -> the same dtype with black at 0 and white at 1. Not clamped; differentiable."""
    return _per_channel(image, list(zip(std, mean)))


def to_uint8(image: Tensor) -> Tensor:
    """Normalised float (..., 3, H, W) -> uint8 in 0..255, rounded; values outside the range are clamped."""
    return denormalise(image.float()).mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _per_channel(image: Tensor, lines: list[tuple[float, float]]) -> Tensor:
    """a * channel + b with plain numbers: constant tensors would be copied to the device, and waited for."""
    channels = zip(image.unbind(-3), lines)
    return torch.stack([channel * a + b for channel, (a, b) in channels], -3)
