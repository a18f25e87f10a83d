"""These distances between images and their reconstructions give one value per image.

Images are float32 (b, 3, H, W) in [0, 1] throughout.
"""

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_MSE = 1e-10  # an exact copy has 100 dB rather than infinity, which would make the mean infinite


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio (b,) in dB, at most 100."""
    mse = (prediction - target).square().flatten(1).mean(1)
    return -10.0 * torch.log10(mse.clamp_min(_MIN_MSE))


def flat_psnr(target: Tensor) -> Tensor:
    """Compute the PSNR (b,) of each image's mean colour, which a reconstruction has to beat."""
    return psnr(target.mean((2, 3), keepdim=True).expand_as(target), target)


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute structural similarity (b,) as Wang et al. 2004: an 11 x 11 Gaussian of sigma 1.5, K 0.01 and 0.03.

    As in torchmetrics 1.9, it is averaged over channels and all pixels, with reflection at the border.
    """
    window = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    window = [weight / sum(window) for weight in window]

    def blur(x: Tensor) -> Tensor:  # sums, as a convolution may round to TF32, too coarse for the variances
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
