"""Sets of images that are known to be bad show what a distance means."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.dit.model.build import build_dit
from megavtp.dit.sampling.sampler import Sampler
from megavtp.evaluation.distances.image_sources import ImageSource, NumberedImages

BLURS = (8, 16)  # sides in pixels of the squares that a blurred image averages: half a patch, a patch
_BATCH = 64  # images drawn with one seed, so that they do not depend on batch size or process count


@dataclass
class Noise:
    """``count`` images of independent, uniform pixels."""

    count: int
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        for start in range(rank * _BATCH, self.count, world * _BATCH):
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + start)
            images = torch.randint(0, 256, (_BATCH, 3, self.size, self.size), generator=draw, dtype=torch.uint8)
            numbers = torch.arange(start, min(start + _BATCH, self.count))
            yield from zip(numbers.split(batch_size), images[: len(numbers)].split(batch_size))


class Blurred:
    """The images of ``source``, each averaged over squares of ``side`` pixels."""

    def __init__(self, source: ImageSource, side: int):
        self._source, self._side, self.size = source, side, source.size

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        for numbers, images in self._source.batches(batch_size, rank, world):
            yield numbers, blur(images, self._side)


def blur(images: Tensor, side: int) -> Tensor:
    """Average uint8 images (b, 3, H, W) over squares of ``side`` pixels; those at the far edges may be smaller."""
    means = F.avg_pool2d(images.float(), side, ceil_mode=True)
    wide = means.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return wide[..., : images.shape[-2], : images.shape[-1]].round().to(torch.uint8)


def untrained(sampler: Sampler, seed: int = 0) -> Sampler:
    """Return ``sampler`` with an untrained DiT of the same shape."""
    config = sampler.dit.config
    device = next(sampler.dit.model.parameters()).device
    model = build_dit(config.model, seed=seed, device=device, attention=config.parallel.attention).eval()
    return Sampler(replace(sampler.dit, model=model), "untrained", sampler.tokenizer, sampler.settings, sampler.dtype)
