"""Distances between an image and its reconstruction, each a value per image.

Images are float32 (b, 3, H, W) in [0, 1] throughout.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_MSE = 1e-10  # an exact copy reads 100 dB instead of infinity, which would swallow the mean


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (b,), at most 100."""
    mse = (prediction - target).square().flatten(1).mean(1)
    return -10.0 * torch.log10(mse.clamp_min(_MIN_MSE))


def flat_psnr(target: Tensor) -> Tensor:
    """PSNR (b,) of painting every image in its own mean colour: what a reconstruction has to beat."""
    return psnr(target.mean((2, 3), keepdim=True).expand_as(target), target)


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (b,) with the settings of Wang et al. 2004: 11 x 11 Gaussian of sigma 1.5, K 0.01, 0.03.

    Averaged over channels and all pixels, the images continued by reflection at the border, as torchmetrics 1.9 does.
    """
    window = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    window = [weight / sum(window) for weight in window]

    def blur(x: Tensor) -> Tensor:  # shifted sums: a convolution may round to TF32, which the variances cannot bear
        x = F.pad(x, (5, 5, 5, 5), mode="reflect")
        for dim in (2, 3):
            size = x.shape[dim] - 10
            x = reduce(torch.add, (weight * x.narrow(dim, i, size) for i, weight in enumerate(window)))
        return x

    mean_p, mean_t = blur(prediction), blur(target)
    var_p = (blur(prediction.square()) - mean_p.square()).clamp_min(0)
    var_t = (blur(target.square()) - mean_t.square()).clamp_min(0)
    covariance = blur(prediction * target) - mean_p * mean_t
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_p * mean_t + c1) / (mean_p.square() + mean_t.square() + c1)
    structure = (2 * covariance + c2) / (var_p + var_t + c2)
    return (luminance * structure).flatten(1).mean(1)
