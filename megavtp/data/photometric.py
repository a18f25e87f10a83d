"""Colour operations on one image: float32 (3, h, w) with values 0..255, changed in place where that is possible.

The definitions are the field's (brightness, contrast, saturation as blends, hue in HSV, ITU-R 601 grey), so models
trained here see what DINOv2-style recipes mean by their numbers. Element-wise torch kernels: 2-5 times as fast as
Pillow's on the sizes of crops (see ``augment.py``).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_RADIUS = 4  # a 9-tap kernel, as DINOv2's


def grey(x: Tensor) -> Tensor:
    """Return the luma (h, w) of (3, h, w)."""
    return (x[0] * 0.2989).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114)


def brightness(x: Tensor, factor: float) -> Tensor:
    """Blend with black: 0 = black, 1 = unchanged."""
    return x.mul_(factor).clamp_(0, 255)


def contrast(x: Tensor, factor: float) -> Tensor:
    """Blend with the mean grey: 0 = flat grey, 1 = unchanged."""
    offset = (1 - factor) * float(grey(x).mean())
    return x.mul_(factor).add_(offset).clamp_(0, 255)


def saturation(x: Tensor, factor: float) -> Tensor:
    """Blend with the grey image: 0 = grey, 1 = unchanged."""
    luma = grey(x).mul_(1 - factor)
    return x.mul_(factor).add_(luma).clamp_(0, 255)


def hue(x: Tensor, shift: float) -> Tensor:
    """Turn the hue circle by ``shift`` (in turns, -0.5..0.5); value and saturation of HSV do not change."""
    red, green, blue = x
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    scale = chroma.clamp_min(1e-6).reciprocal_()  # a grey pixel has chroma 0 and any hue will do
    angle = torch.where(
        high == red,
        (green - blue).mul_(scale),
        torch.where(high == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)),
    )
    angle.add_(6 * shift).remainder_(6)  # in sixths of the circle
    low = high - chroma
    out = torch.empty_like(x)
    # how much of the chroma each channel has at this angle: trapezoids centred on its own primary colour
    torch.sub(angle, 3, out=out[0]).abs_().sub_(1)
    torch.sub(angle, 2, out=out[1]).abs_().neg_().add_(2)
    torch.sub(angle, 4, out=out[2]).abs_().neg_().add_(2)
    return out.clamp_(0, 1).mul_(chroma).add_(low)


def grayscale(x: Tensor) -> Tensor:
    return grey(x).expand(3, -1, -1).clone()


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur with a separable Gaussian of 2 * BLUR_RADIUS + 1 taps, fewer in a smaller image, mirrored at the borders."""
    return _blur_last(_blur_last(x, sigma).transpose(1, 2), sigma).transpose(1, 2)


def _blur_last(x: Tensor, sigma: float) -> Tensor:
    size = x.shape[2]
    radius = min(BLUR_RADIUS, size - 1)
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    padded = F.pad(x, (radius, radius), mode="reflect")
    out = padded[..., radius : radius + size] * (taps[0] / total)
    for i in range(1, radius + 1):
        left, right = padded[..., radius - i : radius - i + size], padded[..., radius + i : radius + i + size]
        out.add_(left + right, alpha=taps[i] / total)
    return out


def solarize(x: Tensor, threshold: float = 128.0) -> Tensor:
    """Invert what is at least ``threshold``."""
    return torch.where(x < threshold, x, 255 - x)
