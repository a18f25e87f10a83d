"""Views of an image: uint8 (3, H, W) in, uint8 (3, size, size) out; the device normalises.

A view reads the same number of uniform draws from its generator whether or not an operation applies. So a changed
probability alters only its own operation.

Speed on one core (a 144 px and a 500 x 375 source): plain 256 px view 0.2-0.4 ms, 96 px crop with all of DINO's
operations 0.9-1.3 ms, 224 px crop 4-6 ms.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megavtp.data import photometric

ATTEMPTS = 10  # random boxes tried before the crop falls back to the centre
BOX_DRAWS = 2 * ATTEMPTS + 2  # areas, aspect ratios, top, left
ASPECT = (3 / 4, 4 / 3)
# DINO's colour jitter: operation, the value that changes nothing, and how far a draw may lie from it
JITTER = (
    (photometric.brightness, 1, 0.4), (photometric.contrast, 1, 0.4), (photometric.saturation, 1, 0.2),
    (photometric.hue, 0, 0.1),
)
BLUR_SIGMA = (0.1, 2.0)


def random_view(
    image: Tensor, size: int, scale: tuple[float, float], rng: np.random.Generator, *, flip: float = 0.0,
    color_jitter: float = 0.0, grayscale: float = 0.0, blur: float = 0.0, solarize: float = 0.0,
) -> Tensor:
    """Make a random crop of ``scale`` of the area, then apply DINOv2's operations (arXiv 2304.07193), each with the
    probability of its keyword. OpenCLIP's augmentations are the first three."""
    draws = rng.random(BOX_DRAWS + 14).tolist()
    top, left, height, width = crop_box(image.shape[1], image.shape[2], scale, draws)
    view = resize(image[:, top : top + height, left : left + width], size, size)
    if draws[BOX_DRAWS] < flip:
        view = view.flip(2)
    # 0 jitter gate, 1-4 factors, 5-8 order, 9 grey, 10 blur gate, 11 sigma, 12 solarize
    u = draws[BOX_DRAWS + 1 :]
    apply = u[0] < color_jitter, u[9] < grayscale, u[10] < blur, u[12] < solarize
    if not any(apply):
        return view
    x = view.float()
    if apply[0]:
        for i in sorted(range(4), key=u[5:9].__getitem__):
            operation, neutral, strength = JITTER[i]
            x = operation(x, neutral + strength * (2 * u[1 + i] - 1))
    if apply[1]:
        x = photometric.grayscale(x)
    if apply[2]:
        x = photometric.gaussian_blur(x, BLUR_SIGMA[0] + u[11] * (BLUR_SIGMA[1] - BLUR_SIGMA[0]))
    if apply[3]:
        x = photometric.solarize(x)
    return x.add_(0.5).clamp_(0, 255).to(torch.uint8)  # the cast truncates


def crop_box(
    height: int, width: int, scale: tuple[float, float], u: Sequence[float]
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random resized crop (Szegedy et al., arXiv 1409.4842) from the first
    ``BOX_DRAWS`` draws.

    It is the first of ATTEMPTS boxes that fits, or else the largest central box with an allowed aspect ratio.
    """
    top, left = u[BOX_DRAWS - 2 : BOX_DRAWS]
    for i in range(ATTEMPTS):  # not at once by NumPy: nearly always the first one fits
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[i])
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** u[ATTEMPTS + i]
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
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
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    ratio = size / min(picture.size)
    picture = picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
