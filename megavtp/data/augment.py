"""Views of an image: uint8 (3, H, W) in, uint8 (3, size, size) out; the device normalises.

A view reads a fixed number of uniform draws from its generator (the crop's, then the colours'; their order is noted
where they are drawn) whether or not an operation applies. So a changed probability alters only its own operation.

Speed on one core (a 144 px and a 500 x 375 source): plain 256 px view 0.2-0.4 ms, 96 px crop with all of DINO's
operations 0.9-1.3 ms, 224 px crop 4-6 ms.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megavtp.data import photometric

ATTEMPTS = 10  # random boxes tried before the crop falls back to the centre
ASPECT = (3 / 4, 4 / 3)
# strength of DINO's colour jitter: factors 1 +- strength, hue shift +- strength turns
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
BLUR_SIGMA = (0.1, 2.0)


def plain_view(
    image: Tensor, size: int, scale: tuple[float, float], flip: float, rng: np.random.Generator, *,
    color_jitter: float = 0.0, grayscale: float = 0.0,
) -> Tensor:
    """Make the contrastive and reconstruction view: a random resized crop of ``scale`` of the area, then OpenCLIP's
    augmentations with their probabilities."""
    return dino_view(image, size, scale, rng, flip=flip, color_jitter=color_jitter, grayscale=grayscale, blur=0.0)


def dino_view(
    image: Tensor, size: int, scale: tuple[float, float], rng: np.random.Generator, *, flip: float = 0.5,
    color_jitter: float = 0.8, grayscale: float = 0.2, blur: float = 0.5, solarize: float = 0.0,
) -> Tensor:
    """Make a global or local crop of DINOv2 (arXiv 2304.07193): crop, flip, colour jitter, grey, blur, solarize.

    The keyword arguments are probabilities.
    """
    view = _crop_and_flip(image, size, scale, flip, rng)
    # draws: 0 jitter gate, 1-4 factors, 5-8 order, 9 grey, 10 blur gate, 11 sigma, 12 solarize
    u = rng.random(13)
    apply = u[0] < color_jitter, u[9] < grayscale, u[10] < blur, u[12] < solarize
    if not any(apply):
        return view
    x = view.float()
    if apply[0]:
        x = _jitter(x, u[1:5], u[5:9])
    if apply[1]:
        x = photometric.grayscale(x)
    if apply[2]:
        x = photometric.gaussian_blur(x, BLUR_SIGMA[0] + float(u[11]) * (BLUR_SIGMA[1] - BLUR_SIGMA[0]))
    if apply[3]:
        x = photometric.solarize(x)
    return x.add_(0.5).clamp_(0, 255).to(torch.uint8)  # the cast truncates


def _jitter(x: Tensor, factors: np.ndarray, order: np.ndarray) -> Tensor:
    """Apply the four operations in a random order, which sorting the draws gives."""
    signed = 2 * factors - 1
    for operation in np.argsort(order, kind="stable"):
        if operation == 0:
            x = photometric.brightness(x, 1 + BRIGHTNESS * float(signed[0]))
        elif operation == 1:
            x = photometric.contrast(x, 1 + CONTRAST * float(signed[1]))
        elif operation == 2:
            x = photometric.saturation(x, 1 + SATURATION * float(signed[2]))
        else:
            x = photometric.hue(x, HUE * float(signed[3]))
    return x


def _crop_and_flip(
    image: Tensor, size: int, scale: tuple[float, float], flip: float, rng: np.random.Generator
) -> Tensor:
    # draws: ATTEMPTS areas, ATTEMPTS aspect ratios, top, left, flip
    u = rng.random(2 * ATTEMPTS + 3)
    top, left, height, width = crop_box(image.shape[1], image.shape[2], scale, u[:-1])
    view = resize(image[:, top : top + height, left : left + width], size, size)
    return view.flip(2) if u[-1] < flip else view


def crop_box(height: int, width: int, scale: tuple[float, float], u: np.ndarray) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random resized crop (Szegedy et al., arXiv 1409.4842) from 22 draws.

    It is the first of ATTEMPTS boxes that fits, or else the largest central box with an allowed aspect ratio.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:ATTEMPTS])
    aspect = np.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * u[ATTEMPTS : 2 * ATTEMPTS])
    widths = np.rint(np.sqrt(area * aspect))
    heights = np.rint(np.sqrt(area / aspect))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        i = int(fits.argmax())
        h, w = int(heights[i]), int(widths[i])
        return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (3, H, W) to (3, height, width), bicubic with antialiasing."""
    # torch's vectorised uint8 kernel wants the channels last; a crop in that order is also the cheapest copy
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, size: int) -> Tensor:
    """Crop as the reconstruction protocol and ADM (arXiv 2105.05233) do: halve with a box filter while the shorter side
    is at least 2 * size, resize it to size (bicubic), take the middle square. The pixels are exactly Pillow's."""
    picture = _to_pillow(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    ratio = size / min(picture.size)
    picture = picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return _from_pillow(picture.crop((left, top, left + size, top + size)))


def _to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _from_pillow(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
