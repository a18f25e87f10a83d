"""An .npz file as ADM's (arXiv 2105.05233) has images in ``arr_0``, uint8 (n, H, W, 3), which are read row by row.

numpy would load the whole array: 10 GB for 50,000 images of 256 pixels. Nothing is unpickled.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from megavtp.errors import UserError

_MEMBER = "arr_0.npy"
_MAX_ROW_BYTES = 3 * 64_000_000
_MAX_RATIO = 1032  # deflate compresses no more than this
# A damaged archive makes zipfile and numpy raise these; RuntimeError is for encryption or an unknown compression.
NPZ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, MemoryError, SyntaxError, zipfile.BadZipFile, zlib.error)


class NpzImages:
    """At most ``limit`` images, spread evenly over the file.

    Attributes:
        width: pixels of every image.

    Raises:
        UserError: the file is damaged, or has no such array.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as file:
                shape, dtype, fortran = _header(file)
                # The size that the archive states is not proven either.
                held = min(archive.getinfo(_MEMBER).file_size, _MAX_RATIO * path.stat().st_size) - file.tell()
        except KeyError:
            raise UserError(f"{path} holds no images: they are an array named arr_0") from None
        except NPZ_ERRORS as error:
            raise UserError(f"{path} is no whole .npz file ({error}); write or copy it again") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or fortran:
            what = "Python objects, which are refused" if dtype.hasobject else f"{dtype} of shape {shape}"
            raise UserError(f"{path}: arr_0 holds {what}; images are uint8 of shape (n, height, width, 3)")
        self._total, self._shape = shape[0], shape[1:]
        self._row_bytes = math.prod(self._shape)
        if self._row_bytes > _MAX_ROW_BYTES:
            raise UserError(f"{path}: images of {shape[2]} x {shape[1]} pixels are larger than any that are read here")
        if self._total * self._row_bytes > held:
            raise UserError(f"{path} claims {self._total} images, more than it holds; write or copy it again")
        self.width = shape[2]
        self._count = self._total if limit is None else min(limit, self._total)

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give numbers (b,) and images, uint8 (b, 3, H, W), for the numbers rank, rank + world, ..."""
        own = range(rank, self._count, world)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(_MEMBER) as file:
                _header(file)
                at = 0
                for first in range(0, len(own), batch_size):
                    numbers = own[first : first + batch_size]
                    rows = []
                    for number in numbers:
                        place = number * self._total // self._count
                        _skip(file, (place - at) * self._row_bytes)
                        rows.append(self._row(file))
                        at = place + 1
                    yield torch.tensor(numbers), torch.stack(rows)
        except NPZ_ERRORS as error:
            raise UserError(f"{self.path} is damaged ({error}); write or copy it again") from None

    def _row(self, file: IO[bytes]) -> Tensor:
        data = file.read(self._row_bytes)
        if len(data) < self._row_bytes:
            raise EOFError("it ends before its last image")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self._shape).permute(2, 0, 1)


def holds_images(path: Path) -> bool:
    """Tell whether there is an array of that name, whatever it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _MEMBER in archive.namelist()
    except NPZ_ERRORS as error:
        raise UserError(f"{path} is no whole .npz file ({error}); write or copy it again") from None


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version} is not known")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, dtype, fortran


def _skip(file: IO[bytes], count: int) -> None:
    """Skip bytes by reading them, the only way in a compressed member."""
    while count > 0:
        data = file.read(min(count, 2**20))
        if not data:
            raise EOFError("it ends before its last image")
        count -= len(data)
