"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738).

Real and decoded pictures are changed alike, so that a discriminator cannot tell them apart by having learnt the real
ones by heart. All draws are a pure function of (seed, step, picture).

Letters: b pictures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megavtp.nn.seeded import named_generator

_DRAWS = 5


def draw_augmentation(*, seed: int, step: int, pictures: Sequence[int], tag: str) -> Tensor:
    """Draw (b, 5) numbers from -1 to 1; ``pictures`` are places in the global batch, ``tag`` tells uses apart."""
    rows = [torch.rand(_DRAWS, generator=named_generator(f"augment {tag} {seed} {step} {i}")) for i in pictures]
    return torch.stack(rows) * 2 - 1


def augment(
    x: Tensor, draws: Tensor, *, brightness: float, saturation: float, contrast: float, translation: float
) -> Tensor:
    """Change the colours of pictures (b, 3, H, W), black at -1 and white at 1, and move them; what comes in is grey.

    Args:
        draws: (b, 5) from -1 to 1.
        brightness: the most that is added or taken away.
        saturation, contrast: the most by which the distance from a pixel's grey, from the picture's mean grows or
            shrinks, as a fraction of it.
        translation: the most that a picture moves, in units of its side.
    """
    light, colour, spread, down, right = (draw.view(-1, 1, 1, 1) for draw in draws.to(x.dtype).unbind(1))
    x = x + light * brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + colour * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + spread * contrast)
    return _moved(_moved(x, 2, down, translation), 3, right, translation)


def _moved(x: Tensor, dim: int, draw: Tensor, translation: float) -> Tensor:
    """Move each picture along a dimension by up to a fraction of its length, by whole pixels."""
    length = x.shape[dim]
    shift = (draw * round(translation * length)).round().long()
    shape = [1, 1, 1, 1]
    shape[dim] = length
    source = torch.arange(length, device=x.device).view(shape) - shift  # (b, 1, length, 1) or (b, 1, 1, length)
    inside = (source >= 0) & (source < length)
    return torch.where(inside, x.gather(dim, source.clamp(0, length - 1).expand_as(x)), 0.0)
