"""An .npz file as ADM's (arXiv 2105.05233) has images in ``arr_0``, uint8 (n, H, W, 3), which are read row by row.

numpy would load the whole array: 10 GB for 50,000 images of 256 pixels. Nothing is unpickled.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from megavtp.errors import UserError

_MEMBER = "arr_0.npy"
_MAX_ROW_BYTES = 3 * 64_000_000
_MAX_RATIO = 1032  # deflate compresses no more than this


@contextmanager
def npz_errors(path: str | Path, what: str = "no whole .npz file") -> Iterator[None]:
    """Turn what a damaged archive makes zipfile and numpy raise into a ``UserError`` that says what ``path`` is."""
    try:
        yield
    # RuntimeError is for encryption or an unknown compression, TypeError and AttributeError for other arrays.
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, SyntaxError, TypeError, AttributeError,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise UserError(f"{path} is {what} ({error}); write or copy it again") from None


def holds_images(path: Path) -> bool:
    """Tell whether there is an array of that name, whatever it holds."""
    with npz_errors(path), zipfile.ZipFile(path) as archive:
        return _MEMBER in archive.namelist()


class NpzArray:
    """The images of the file at ``path``. Raises ``UserError`` if it is damaged, or has no such array."""

    def __init__(self, path: Path):
        if not holds_images(path):
            raise UserError(f"{path} holds no images: they are an array named arr_0")
        self.path = path
        with npz_errors(path), zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as file:
            shape, fortran, dtype = _header(file)
            # The size that the archive states is not proven either.
            held = min(archive.getinfo(_MEMBER).file_size, _MAX_RATIO * path.stat().st_size) - file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or fortran:
            what = "Python objects, which are refused" if dtype.hasobject else f"{dtype} of shape {shape}"
            raise UserError(f"{path}: arr_0 holds {what}; images are uint8 of shape (n, height, width, 3)")
        self._total, self._shape = shape[0], shape[1:]
        self._row_bytes = math.prod(self._shape)
        if self._row_bytes > _MAX_ROW_BYTES:
            raise UserError(f"{path}: images of {shape[2]} x {shape[1]} pixels are larger than any that are read here")
        if self._total * self._row_bytes > held:
            raise UserError(f"{path} claims {self._total} images, more than it holds; write or copy it again")

    def __len__(self) -> int:
        return self._total

    def read(self, places: Iterable[int]) -> Iterator[tuple[Path, Tensor]]:
        """Give file and image (3, H, W) of ascending places. To pass over others, it reads them, as it must in a
        compressed archive."""
        with npz_errors(self.path, "damaged"), zipfile.ZipFile(self.path) as archive, archive.open(_MEMBER) as file:
            _header(file)
            at, row = 0, b""
            for place in places:
                while at <= place:
                    row = file.read(self._row_bytes)
                    if len(row) < self._row_bytes:
                        raise EOFError("it ends before its last image")
                    at += 1
                yield self.path, torch.frombuffer(bytearray(row), dtype=torch.uint8).view(self._shape).permute(2, 0, 1)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version} is not known")
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
