"""The images of a comparison come from a folder, an .npz file as ADM's, or shards.

``dit.sampling.sampler.GeneratedImages`` draws them with a DiT. Every source is a fixed sequence of square images of one
size, which processes share by their numbers.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megavtp.data.augment import center_crop
from megavtp.data.decode import MAX_PIXELS, BadSample, decode_image
from megavtp.data.files import refuse_remote
from megavtp.data.loader import EvalDataset
from megavtp.data.shards import ShardDataset, open_dataset, split_folders
from megavtp.errors import UserError
from megavtp.evaluation.distances.npz_file import NpzArray
from megavtp.evaluation.tokenizer.interface import NoCaptions
from megavtp.parallel.looking import from_first, look_once

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

NumberedImages = tuple[Tensor, Tensor]
"""Numbers of the images (b,), int64 on the CPU, and the images, uint8 (b, 3, size, size), on the CPU or a GPU."""


class ImageSource(Protocol):
    """``size`` is the pixels of a side, ``len`` the number of images, including broken ones that are skipped."""

    size: int

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        """Give this process's share; over all ranks, each number below ``len`` comes at most once."""


class StoredSource(ImageSource, Protocol):
    """Images in files."""

    @property
    def digest(self) -> str:
        """Tells these files from others: a hash of their names and sizes, or an archive's checksum. Of all images at
        the place, of which ``len`` may be a part. Raises ``UserError``."""
        ...


def open_images(path: str | Path, size: int | None = None, limit: int | None = None) -> StoredSource:
    """Open the images at ``path``: an .npz file with ``arr_0``, a folder of shards, or of images and sub-folders.

    They are at most ``limit`` images (None = all), spread evenly over the source, cropped to the middle square and
    resized to ``size``, as ADM does. With None they must already be square and of one size, which shards are not.
    All ranks open them together, and rank 0 alone looks at the files. ``UserError`` if there is nothing usable, or the
    sizes differ and ``size`` is None.
    """
    path = refuse_remote(path)
    found = from_first(lambda: _look(path, size))
    if isinstance(found, Path):
        assert size is not None, "_look refuses shards without a size"
        return ShardImages(look_once(lambda: open_dataset(found)), size, limit)
    return _StoredImages(NpzArray(path) if found is None else _Folder(path, found), size, limit)


def _look(path: Path, size: int | None) -> Path | list[Path] | None:
    """Return the folder of shards at ``path``, or the image files below it; None for an .npz file. UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of images, an .npz file or a folder of shards")
    if path.suffix == ".npz":
        return None
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor an .npz file; give one of these")
    # A data set gives its train split: a generator is measured against what it learnt from.
    if folder := split_folders(path).get("train"):
        if size is None:
            raise UserError(f"{path} holds shards, whose images may have any size: say which by --size")
        return folder
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{path} holds neither images ({' '.join(SUFFIXES)}) nor shards; name another folder")
    return files


class ShardImages:
    """The images of an ``EvalDataset``, without their captions."""

    def __init__(self, dataset: ShardDataset, size: int, limit: int | None):
        self.size, self.digest = size, dataset.digest
        self._samples = EvalDataset(dataset, NoCaptions(), size, len(dataset) if limit is None else limit, MAX_PIXELS)

    def __len__(self) -> int:
        return len(self._samples)

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        for batch in self._samples.batches(batch_size, rank, world):
            yield batch["index"], batch["image"]

    def metadata(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Read the metadata of the images of these numbers."""
        return self._samples.metadata(numbers)


class _Folder:
    """The image files below a folder, sorted by path."""

    def __init__(self, folder: Path, files: list[Path]):
        self.path, self._files = folder, files

    def __len__(self) -> int:
        return len(self._files)

    @property
    def digest(self) -> str:
        """The SHA-256 of the files' places below the folder, and their sizes. Raises ``UserError``."""
        found = hashlib.sha256()
        for file in self._files:
            try:
                size = file.stat().st_size
            except OSError as error:
                raise UserError(f"{file} cannot be read ({error.strerror}); start again") from None
            found.update(os.fsencode(file.relative_to(self.path)) + f" {size}\n".encode())
        return found.hexdigest()

    def read(self, places: Iterable[int]) -> Iterator[tuple[Path, Tensor | None]]:
        """Give file and image (3, H, W) of ascending places; None for a broken file, which the log names."""
        for file in (self._files[place] for place in places):
            try:
                yield file, decode_image(file.read_bytes(), MAX_PIXELS)
            except (BadSample, OSError) as error:
                logger.warning("image left out: %s: %s", file, error)
                yield file, None


class _StoredImages:
    """At most ``limit`` images of a folder or an array, spread evenly over it.

    They are cropped to ``size``; with None they must all have the width of the first one that can be read.
    """

    def __init__(self, store: _Folder | NpzArray, size: int | None, limit: int | None):
        self._store, self._crop = store, size is not None
        self._count = len(store) if limit is None else min(limit, len(store))
        self.size = self._first_width() if size is None else size

    def __len__(self) -> int:
        return self._count

    @property
    def digest(self) -> str:
        return self._store.digest

    def _read(self, numbers: range) -> Iterator[tuple[Path, Tensor | None]]:
        return self._store.read(number * len(self._store) // self._count for number in numbers)

    def _first_width(self) -> int:
        image = next((image for _, image in self._read(range(self._count)) if image is not None), None)
        if image is None:
            raise UserError(f"{self._store.path} holds no image that can be read; name another folder")
        return image.shape[2]

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[NumberedImages]:
        own = range(rank, self._count, world)
        read = zip(own, self._read(own))
        squares = ((number, self._square(image, file)) for number, (file, image) in read if image is not None)
        while batch := tuple(islice(squares, batch_size)):
            numbers, images = zip(*batch, strict=True)
            yield torch.tensor(numbers), torch.stack(images)

    def _square(self, image: Tensor, file: Path) -> Tensor:
        height, width = image.shape[1:]
        if height == width == self.size:
            return image
        if not self._crop:
            raise UserError(
                f"{file} is {width} x {height} pixels, not {self.size} x {self.size} as the first image is wide: give "
                "--size to crop all images to one size"
            )
        return center_crop(image, self.size)
