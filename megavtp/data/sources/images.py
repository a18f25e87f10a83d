"""Shards from the user's images: class folders, images with a .txt beside them, or a table of paths and captions."""

import io
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from megavtp.data.decode import MAX_PIXELS, BadSample, decode_image, open_image, to_rgb
from megavtp.data.files import refuse_remote
from megavtp.data.new_sample import NewSample, Skipped
from megavtp.data.report import SkipReport
from megavtp.data.sample_text import MAX_TEXT, check_length, encodable, pack_text
from megavtp.data.sources.tables import Entry, read_table
from megavtp.data.workers import ordered_map
from megavtp.data.write import staged_folder, write_dataset
from megavtp.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's format -> extension in the shard
_JPEG_QUALITY = 95


def prepare_images(
    source: str | Path, out: str | Path, *, size: int = 0, test_fraction: float = 0.05, vocab_size: int = 8192,
    shard_size: int = 1000, seed: int = 0, workers: int = 2, max_bad: int = 1000, max_pixels: int = MAX_PIXELS,
    overwrite: bool = False, quiet: bool = False,
) -> dict[str, Any]:
    """Write the images and captions of ``source`` to ``out`` and return its ``dataset.json``.

    ``source``: a folder (``folder_entries``) or a table (``read_table``). ``size``: pixels the shorter side is reduced
    to (never enlarged); 0 keeps the bytes of JPEG, PNG and WebP files. Split and order follow ``seed``. Every image is
    decoded once; bad ones are skipped. Raises ``UserError`` for more than ``max_bad`` of them or if nothing is usable.
    """
    if size < 0 or shard_size < 1:
        raise UserError(f"--size {size} and --shard-size {shard_size} must not be negative, the latter not zero")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction}; choose 0 or more and less than 1")
    path = refuse_remote(source)
    if refuse_remote(out).resolve() in (path.resolve(), *path.resolve().parents):
        raise UserError(f"--from {path} lies in --out {out}, which would take its place; choose another --out")
    report = SkipReport()
    if path.is_dir():
        found = folder_entries(path)
    elif path.is_file():
        found = read_table(path)
    else:
        raise UserError(f"--from {path} does not exist; name a folder of images or a .csv, .tsv or .jsonl file")
    entries = []
    for entry in found:
        try:
            if isinstance(entry, Skipped):
                raise BadSample(entry.reason)
            if not entry.caption:
                raise BadSample("no caption")
            pack_text(entry.caption, entry.meta)
            entries.append(entry)
        except BadSample as error:
            report.skip(str(error), entry.name if isinstance(entry, Skipped) else str(entry.path))
            report.limit(max_bad)
    order = list(enumerate(entries))
    random.Random(f"{seed}/images").shuffle(order)
    tests = round(test_fraction * len(order))
    if tests == len(order):
        tests = 0  # a test split of all there is would leave nothing to train on
    load = partial(_load, size=size, max_pixels=max_pixels)
    with staged_folder(out, overwrite) as root:
        name, spelled = encodable(path.resolve().name), encodable(str(path))
        info = {"name": name, "source": spelled, "attribution": [], "image_size": size, "seed": seed}
        splits = {"train": order[tests:], "test": order[:tests]}
        streams = {split: ordered_map(load, jobs, workers, split, quiet) for split, jobs in splits.items()}
        info = write_dataset(
            root, streams, info, report, label_fields=("label",), vocab_size=vocab_size, shard_size=shard_size,
            max_bad=max_bad,
        )
    return info | {"skips": report.lines()}


def folder_entries(folder: Path) -> Iterator[Entry | Skipped]:
    """Yield all images below ``folder``, sorted. The caption is IMAGE.txt beside the image, or else the name of the
    subfolder that holds the image, as words ("red_apple" becomes "red apple")."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _SUFFIXES or not path.is_file():
            continue
        label = "" if path.parent == folder else " ".join(path.parent.name.replace("_", " ").split())
        try:
            yield Entry(path, _caption_beside(path) or label, label)
        except BadSample as error:
            yield Skipped(str(error), str(path))


def _caption_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return ""
    try:
        with beside.open("rb") as file:
            text = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise BadSample(f"caption not readable: {error.strerror}") from None
    check_length(len(text))
    return " ".join(text.decode("utf-8-sig", errors="replace").split())


def _load(job: tuple[int, Entry], size: int, max_pixels: int) -> NewSample | Skipped:
    number, entry = job
    try:
        if not entry.path.is_file():  # a pipe would block; a path with a zero byte is no file either
            return Skipped("file not readable", f"{entry.path} (no such file)")
        image, extension = _fit(entry.path.read_bytes(), size, max_pixels)
    except OSError as error:
        return Skipped("file not readable", f"{entry.path} ({error.strerror})")
    except BadSample as error:
        return Skipped("bad image", f"{entry.path} ({error})")
    return NewSample(f"{number:09d}", image, extension, entry.caption, entry.meta)


def _fit(data: bytes, size: int, max_pixels: int) -> tuple[bytes, str]:
    """Return the bytes to store and their extension; an image is encoded again only where that is necessary."""
    pixels = decode_image(data, max_pixels)  # this comes first, as only decoding shows that a file is damaged
    extension = _KEPT.get(open_image(data, max_pixels).format or "")
    shorter = min(pixels.shape[1:])
    if extension and not 0 < size < shorter:
        return data, extension
    rgb = to_rgb(open_image(data, max_pixels))  # by Pillow: the stored bytes depend on no optional package
    if 0 < size < shorter:
        scale = size / shorter
        rgb = rgb.resize([max(1, round(side * scale)) for side in rgb.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if extension == "jpg":
        rgb.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return file.getvalue(), "jpg"
    rgb.save(file, "PNG")
    return file.getvalue(), "png"
