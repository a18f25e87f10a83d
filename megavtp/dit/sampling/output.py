"""Generated images go to a PNG sheet, a folder of PNG files or ADM's ``.npz``, which appear only when complete."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import count, groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megavtp.data.all_or_nothing import all_or_nothing
from megavtp.data.files import replaced
from megavtp.errors import UserError
from megavtp.training import pictures

Sink = Callable[[Tensor], None]
"""This takes the next images, uint8 (b, 3, H, W) on the CPU."""

_MOST_ON_A_SHEET = 1024
_WRITERS = 4  # threads that compress PNG files


def open_output(out: Path, names: Sequence[str]) -> AbstractContextManager[Sink]:
    """Open a sink of the kind that the suffix of ``out`` asks for: .png, .npz, or none for a folder.

    Args:
        names: a name for each image, in order; a sheet writes them beside its rows.

    Raises:
        UserError: the suffix is another, a sheet cannot show so many images, or the place cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix == ".npz":
        return _npz(out, len(names))
    if suffix == ".png":
        if len(names) > _MOST_ON_A_SHEET:
            raise UserError(f"--out {out}: {len(names)} images are too many for a sheet; give a folder or a .npz file")
        return _sheet(out, names)
    if suffix:
        raise UserError(f"--out {out}: give a .png file, a .npz file, or a folder's name without a suffix")
    return _folder(out)


@contextmanager
def _folder(out: Path) -> Iterator[Sink]:
    """Write 000000.png and so on into a new folder."""
    with all_or_nothing(out) as folder, ThreadPoolExecutor(_WRITERS) as pool:
        folder.mkdir()
        jobs: list[Future] = []
        numbers = count()

        def add(images: Tensor) -> None:
            for job in jobs:
                job.result()  # at most one batch waits to be compressed
            made = map(pictures.to_picture, images)
            jobs[:] = [pool.submit(picture.save, folder / f"{next(numbers):06d}.png") for picture in made]

        yield add
        for job in jobs:
            job.result()


@contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """Do as ``replaced``, in a folder that need not exist yet; an OSError becomes a UserError that names ``out``."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None


@contextmanager
def _npz(out: Path, images_total: int) -> Iterator[Sink]:
    """Write ``arr_0``, uint8 (images_total, H, W, 3), as ADM's evaluator reads it (github.com/openai/guided-diffusion).

    The images are streamed, as all together may be larger than the memory.
    """
    entry = zipfile.ZipInfo("arr_0.npy")  # its date is fixed, so the same images give the same bytes
    with _replaced(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(entry, "w", force_zip64=True) as file:
            begun = False

            def add(images: Tensor) -> None:
                nonlocal begun
                rows = images.permute(0, 2, 3, 1).contiguous().numpy()
                if not begun:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (images_total, *rows.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                    begun = True
                file.write(rows.data)

            yield add


@contextmanager
def _sheet(out: Path, names: Sequence[str]) -> Iterator[Sink]:
    """Draw rows of up to 8 images; each new name begins a row, and is written at its left."""
    with _replaced(out) as partial:
        batches: list[Tensor] = []
        yield batches.append
        draw_sheet(torch.cat(batches), names).save(partial, format="PNG")


def draw_sheet(images: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw ``images`` uint8 (n, 3, H, W) in rows, see ``_sheet``; ``names`` has one for each image."""
    rows: list[tuple[str, Tensor]] = []
    drawn = 0
    for name, run in groupby(names):
        own = images[drawn : drawn + len(list(run))]
        drawn += len(own)
        rows += [("" if number else name, row) for number, row in enumerate(own.split(pictures.COLUMNS))]
    return pictures.draw_sheet(rows)
