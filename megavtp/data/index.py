"""The side-car index of a shard: where each sample's image, caption and metadata lie in the tar.

With it any sample is one seek away, so position -> sample can be a pure function of (seed, step).
Columns, one entry for each sample: the key, the image's offset, size and extension, the offset and size of caption and
metadata; in bytes from the start of the tar, size 0 where there is no such member.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import BinaryIO, Literal

from megavtp.data.decode import BadSample
from megavtp.data.files import refuse_remote, write_json
from megavtp.data.report import SkipReport
from megavtp.data.sample_text import caption_of, check_length, decode_text, parse_meta
from megavtp.data.tar_scan import TarSample, find_tars, scan_tar
from megavtp.data.workers import progress
from megavtp.errors import UserError
from megavtp.json_file import Count, Positive, form

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@form
class SideCar:
    """``SHARD.tar.index.json`` holds the tar's name and size, and the columns. Only types are checked here: ``shards``
    checks the numbers of a whole column at once, which is faster."""

    version: Literal[1]
    shard: str
    bytes: Count
    keys: list[str]
    image_offset: list[int]
    image_size: list[int]
    image_ext: list[str]
    caption_offset: list[int]
    caption_size: list[int]
    meta_offset: list[int]
    meta_size: list[int]


_COLUMNS = [column.name for column in fields(SideCar)][3:]


@form
class IndexedShard:
    file: str
    samples: Positive
    bytes: Positive


@form
class FolderIndex:
    """``index.json`` lists the shards of a folder; ``total`` counts the samples of all."""

    version: Literal[1]
    total: Positive
    shards: list[IndexedShard]


def sidecar_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.json")


def index_shard(path: str | Path, report: SkipReport) -> int:
    """Write the side-car of one tar; return the number of usable samples, which have an image (jpg, jpeg, png, webp)
    and a caption that is not blank: KEY.txt, else "caption" in KEY.json. The others are skipped and named in
    ``report``. Raises ``UserError`` as ``scan_tar`` does."""
    path = refuse_remote(path)
    rows: dict[str, tuple] = {}
    with path.open("rb") as file:
        for sample in scan_tar(path, report):
            try:
                row = _row(sample, file)
                if sample.key in rows:
                    raise BadSample("key used twice")
                if sample.before_cut and not row[-1] and any(other[-1] for other in rows.values()):
                    raise BadSample("sample cut off by the end of the tar")
            except BadSample as error:
                report.skip(str(error), f"{path.name}: {sample.key}")
            else:
                rows[sample.key] = row
    report.kept += len(rows)
    columns = {name: [row[i] for row in rows.values()] for i, name in enumerate(_COLUMNS)}
    write_json(sidecar_path(path), {"version": 1, "shard": path.name, "bytes": path.stat().st_size, **columns})
    return len(rows)


def build_index(
    folder: str | Path, report: SkipReport | None = None, max_bad: int | None = None, quiet: bool = True
) -> SkipReport:
    """Index every ``*.tar`` of a folder and write its ``index.json``, which leaves out shards without a usable sample;
    return what was kept and skipped. Raises ``UserError``, and writes no ``index.json``, where nothing usable is left
    or more than ``max_bad`` samples had to be skipped."""
    folder = refuse_remote(folder)
    report = report or SkipReport()
    shards = find_tars(folder)
    entries = []
    for shard in progress(shards, len(shards), f"index {folder.name}", quiet):
        try:
            count = index_shard(shard, report)
        except OSError as error:
            raise UserError(f"cannot index {shard} ({error}); its folder must be readable and writable") from None
        if max_bad is not None:
            report.limit(max_bad)
        if count:
            entries.append(IndexedShard(shard.name, count, shard.stat().st_size))
    if not entries:
        raise UserError(f"no usable image-text sample in {folder}: {'; '.join(report.lines())}")
    index = FolderIndex(1, sum(entry.samples for entry in entries), entries)
    write_json(folder / "index.json", asdict(index), 1)
    return report


def _row(sample: TarSample, file: BinaryIO) -> tuple:
    """Return the sample's values in the order of the columns; ``BadSample`` if it is not usable."""
    images = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if not images:
        raise BadSample("no image")
    offset, size = sample.members[images[0]]
    if not size:
        raise BadSample("empty image")
    meta_offset, meta_size = sample.members.get("json", (0, 0))
    caption_offset, caption_size = sample.members.get("txt", (0, 0))
    check_length(meta_size, caption_size)
    meta = parse_meta(_read(file, meta_offset, meta_size)) if meta_size else {}
    if caption_size and not decode_text(_read(file, caption_offset, caption_size)):
        caption_size = 0  # a blank .txt hides no caption in the metadata
    if not caption_size and not caption_of(meta):
        raise BadSample("no caption")
    return (sample.key, offset, size, images[0], caption_offset, caption_size, meta_offset, meta_size)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
