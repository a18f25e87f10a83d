"""The two pixel formats, and how one becomes the other.

Images are stored and displayed as uint8 in 0..255. Models take floats, normalised per channel with the statistics of
ImageNet.
"""

import torch
from torch import Tensor

Channels = tuple[float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(
    image: Tensor, dtype: torch.dtype = torch.float32, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD
) -> Tensor:
    """Normalise uint8 (..., 3, H, W) in 0..255 per channel -> ``dtype`` (..., 3, H, W)."""
    return _per_channel(image.to(dtype), [(1 / (255 * s), -m / s) for m, s in zip(mean, std)])


def denormalise(image: Tensor, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD) -> Tensor:
    """Map normalised floats (..., 3, H, W) to black at 0 and white at 1, not clamped; the map is differentiable."""
    return _per_channel(image, list(zip(std, mean)))


def from_unit(image: Tensor, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD) -> Tensor:
    """Normalise floats (..., 3, H, W) with black at 0 and white at 1: the inverse of ``denormalise``."""
    return _per_channel(image, [(1 / s, -m / s) for m, s in zip(mean, std)])


def to_uint8(image: Tensor) -> Tensor:
    """Convert normalised floats (..., 3, H, W) to uint8 in 0..255, rounded and clamped."""
    return denormalise(image.float()).mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _per_channel(image: Tensor, lines: list[tuple[float, float]]) -> Tensor:
    """Compute a * channel + b with plain numbers: copying constant tensors to the device would stall the host."""
    return torch.stack([channel * a + b for channel, (a, b) in zip(image.unbind(-3), lines)], -3)
