"""ADM's .npz files (arXiv 2105.05233) hold images, or the mean and covariance of their features, or both.

Images are in ``arr_0``, uint8 (n, H, W, 3), which is read row by row: numpy would load the whole array, 10 GB for
50,000 images of 256 pixels. The statistics are ``mu`` (d,) and ``sigma`` (d, d). Nothing is unpickled.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from megavtp.data.decode import MAX_PIXELS
from megavtp.errors import UserError
from megavtp.evaluation.distances.feature_sets import FeatureStatistics
from megavtp.evaluation.distances.network import INCEPTION
from megavtp.evaluation.report import write_file

_MEMBER = "arr_0.npy"
_MAX_ROW_BYTES = 3 * MAX_PIXELS
_MAX_RATIO = 1032  # deflate compresses no more than this
_REMEDY = "give a reference of the same network, or its images"


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

    @property
    def digest(self) -> str:
        """The archive's checksum of the images, and their bytes. Raises ``UserError``."""
        with npz_errors(self.path), zipfile.ZipFile(self.path) as archive:
            member = archive.getinfo(_MEMBER)
        return f"{member.CRC:08x} {member.file_size}"

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


def read_statistics(path: str | Path, network: str, dims: int) -> FeatureStatistics | None:
    """Read the statistics in the file to the CPU; None if it has none (ADM's files also hold images).

    In a file that does not name the network, as ADM's, they are of Inception's features. Nothing is unpickled.
    ``UserError`` if the file is damaged, or its statistics are another network's.
    """
    with npz_errors(path, "no whole .npz file of plain arrays"), np.load(path, allow_pickle=False) as arrays:
        if not {"mu", "sigma"} <= set(arrays.files):
            return None
        made_by = str(arrays["network"]) if "network" in arrays.files else INCEPTION
        count = int(arrays["count"]) if "count" in arrays.files else None
        mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
    if made_by != network:
        raise UserError(f"{path} holds statistics of {made_by} features, these images' are {network}'s; {_REMEDY}")
    if mean.shape != (dims,) or covariance.shape != (dims, dims):
        raise UserError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape} do not belong to {dims} features; {_REMEDY}"
        )
    if not (np.isfinite(mean).all() and np.allclose(covariance, covariance.T)):
        raise UserError(f"{path}: mu is not finite or sigma is no symmetric matrix; copy or write it again")
    return FeatureStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), count)


def write_statistics(path: str | Path, statistics: FeatureStatistics, network: str) -> None:
    """Write a file for ``read_statistics``, ADM's and other FID scripts, and rename it into place when complete."""
    if Path(path).suffix != ".npz":
        raise UserError(f"{path}: statistics go into an .npz file; name one")
    arrays: dict[str, Any] = {
        "mu": statistics.mean.cpu().numpy(), "sigma": statistics.covariance.cpu().numpy(), "network": network,
    }
    if statistics.count is not None:  # None would be pickled, which no reader allows
        arrays["count"] = statistics.count
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_file(path, file.getvalue())
