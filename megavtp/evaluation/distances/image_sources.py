"""The images of a comparison come from a folder, an .npz file as ADM's, or shards.

``dit.sampling.sampler.GeneratedImages`` draws them with a DiT. Every source is a fixed sequence of square images of one
size, which processes share by their numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megavtp.data.augment import center_crop
from megavtp.data.decode import BadSample, decode_image
from megavtp.data.files import refuse_remote
from megavtp.data.loader import EvalDataset
from megavtp.data.shards import open_dataset, split_folders
from megavtp.errors import UserError
from megavtp.evaluation.distances.npz_images import NpzImages
from megavtp.evaluation.tokenizer.interface import NoCaptions

logger = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

NumberedImages = tuple[Tensor, Tensor]
"""Numbers of the images (b,), int64, and the images, uint8 (b, 3, size, size), on the CPU or a GPU."""


class ImageSource(Protocol):
    """``size`` is the pixels of a side, ``len`` the number of images, including broken ones that are skipped."""

    @property
    def size(self) -> int: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        """Give this process's share; over all ranks, each number below ``len`` comes at most once."""


def open_images(path: str | Path, size: int | None = None, limit: int | None = None) -> ImageSource:
    """Open the images at ``path``: an .npz file with ``arr_0``, a folder of shards, or of images and sub-folders.

    Args:
        size: images are cropped to the middle square and resized to this, as ADM does. With None they must already be
            square and of one size, which shards are not.
        limit: the most images, spread evenly over the source; None = all.

    Raises:
        UserError: there is nothing usable, or the sizes differ and ``size`` is None.
    """
    path = refuse_remote(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of images, an .npz file or a folder of shards")
    if path.suffix == ".npz":
        return _Cropped(NpzImages(path, limit), size)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor an .npz file; give one of these")
    # A data set gives its train split: a generator is measured against what it learnt from.
    if folder := split_folders(path).get("train"):
        if size is None:
            raise UserError(f"{path} holds shards, whose images may have any size: say which by --size")
        return _ShardImages(folder, size, limit)
    return _FolderImages(path, size, limit)


class _ShardImages:
    """The images of an ``EvalDataset``, without their captions."""

    def __init__(self, folder: Path, size: int, limit: int | None):
        dataset = open_dataset(folder)
        self.size = size
        self._samples = EvalDataset(dataset, NoCaptions(), size, len(dataset) if limit is None else limit, MAX_PIXELS)

    def __len__(self) -> int:
        return len(self._samples)

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        for batch in self._samples.batches(batch_size, rank, world):
            yield batch["index"], batch["image"]


class _FolderImages:
    """The image files below a folder, sorted by path."""

    def __init__(self, folder: Path, size: int | None, limit: int | None):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"{folder} holds neither images ({' '.join(SUFFIXES)}) nor shards; name another folder")
        count = len(files) if limit is None else min(limit, len(files))
        self._files = [files[i * len(files) // count] for i in range(count)]
        self._size = size
        self.size = _first_size(self._files) if size is None else size

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        numbers: list[int] = []
        images: list[Tensor] = []
        for number in range(rank, len(self._files), world):
            image = _read(self._files[number])
            if image is None:
                continue
            numbers.append(number)
            images.append(fit(image, self.size, self._size is not None, self._files[number]))
            if len(images) == batch_size:
                yield torch.tensor(numbers), torch.stack(images)
                numbers, images = [], []
        if images:
            yield torch.tensor(numbers), torch.stack(images)


def _read(file: Path) -> Tensor | None:
    """Read an image (3, H, W); None for a broken file, which the log names."""
    try:
        return decode_image(file.read_bytes(), MAX_PIXELS)
    except (BadSample, OSError) as error:
        logger.warning("image left out: %s: %s", file, error)
        return None


def _first_size(files: Sequence[Path]) -> int:
    """Return the width of the first image that can be read."""
    image = next((image for file in files if (image := _read(file)) is not None), None)
    if image is None:
        raise UserError(f"{files[0].parent} holds no image that can be read; name another folder")
    return image.shape[2]


class _Cropped:
    """The images of an .npz file, at the size that is asked for."""

    def __init__(self, images: NpzImages, size: int | None):
        self._images, self._size = images, size
        self.size = images.width if size is None else size

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        for numbers, images in self._images.batches(batch_size, rank, world):
            crop = self._size is not None
            yield numbers, torch.stack([fit(image, self.size, crop, self._images.path) for image in images])


def fit(image: Tensor, size: int, crop: bool, where: Path) -> Tensor:
    """Give an image the shape (3, size, size), by a crop if ``crop`` allows it; else another size is a UserError."""
    if image.shape[1:] == (size, size):
        return image
    if not crop:
        height, width = image.shape[1:]
        raise UserError(
            f"{where} is {width} x {height} pixels, not {size} x {size} as the first image is wide: give --size to "
            "crop all images to one size"
        )
    return center_crop(image, size)
