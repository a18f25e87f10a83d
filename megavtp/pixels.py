"""The two pixel formats and the way between them.

Stored and displayed: uint8 in 0..255. In the models: float, normalised per channel with the ImageNet statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)


def normalise(image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (..., 3, H, W) in 0..255 -> ``dtype`` (..., 3, H, W), normalised per channel."""
    image = image.to(dtype)
    mean, std = _channels(IMAGENET_MEAN, image), _channels(IMAGENET_STD, image)
    return image * (1 / (255 * std)) - mean / std


def denormalise(image: Tensor) -> Tensor:
    """Normalised float (..., 3, H, W) -> the same dtype with black at 0 and white at 1. Not clamped; differentiable."""
    return image * _channels(IMAGENET_STD, image) + _channels(IMAGENET_MEAN, image)


def to_uint8(image: Tensor) -> Tensor:
    """Normalised float (..., 3, H, W) -> uint8 in 0..255, rounded; values outside the range are clamped."""
    return denormalise(image.float()).mul(255).round_().clamp_(0, 255).to(torch.uint8)
