"""Random access to the samples of indexed tar shards."""

import hashlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megavtp.data.decode import BadSample
from megavtp.data.files import refuse_remote
from megavtp.data.index import FolderIndex, IndexedShard, SideCar, sidecar_path
from megavtp.data.sample_text import caption_of, decode_text, parse_meta
from megavtp.data.tar_scan import holds_shards, no_tars
from megavtp.errors import UserError
from megavtp.json_file import read_json

_LEAST_SAMPLE = 2 * tarfile.BLOCKSIZE  # bytes: the header of the image, and at least one block of the image
_LOOKS = 16  # threads that ask for sizes; each waits for the storage, which may be far away
_OPEN_SHARDS = 128  # tars and side-cars a process holds at a time; a rank reads one or two shards of each stream


@dataclass(frozen=True, slots=True)
class RawSample:
    """One image-text pair as it lies in the shard. ``id`` ("shard-000000/KEY") names it in logs."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any]
    id: str


class _Shard:
    """An open tar with its side-car columns; it is closed when its last user drops it."""

    def __init__(self, path: Path, samples: int, size: int, remedy: str):
        side = read_json(sidecar_path(path), SideCar, remedy)
        self.keys = side.keys
        columns = (
            side.image_offset, side.image_size, side.caption_offset, side.caption_size, side.meta_offset, side.meta_size
        )
        if any(len(column) != samples for column in (side.keys, side.image_ext, *columns)):
            raise UserError(f"{sidecar_path(path)} does not match index.json; {remedy}")
        try:
            self.spans = np.array(columns, dtype=np.int64).T.copy()  # (samples, columns)
            inside = self.spans.min() >= 0 and self.spans.max() <= size and self.spans[:, 1].min() > 0
            inside = inside and (self.spans[:, ::2] + self.spans[:, 1::2]).max() <= size
        except OverflowError:
            inside = False
        if not inside:
            raise UserError(f"{sidecar_path(path)} names bytes that {path.name} does not have; {remedy}")
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path} cannot be opened ({error.strerror}); {remedy}") from None
        # Tars are padded to 10 KiB, so one of another content may well have the same size: look at two headers too.
        same = os.fstat(self.fd).st_size == side.bytes == size
        if not (same and self._has_header(0) and self._has_header(samples - 1)):
            raise UserError(f"{path} has changed since it was indexed; {remedy}")

    def _has_header(self, row: int) -> bool:
        """Whether the tar header of this row's image lies where it should and tells the recorded size."""
        offset, size = self.spans[row, :2].tolist()
        try:
            block = os.pread(self.fd, tarfile.BLOCKSIZE, max(0, offset - tarfile.BLOCKSIZE))
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, OSError):
            return False
        return header.isreg() and header.size == size

    def pread(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:  # the kernel may return less, and at most 2 GiB at a time
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                raise BadSample(f"short read: {len(data)} of {size} bytes at byte {offset}")
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardDataset:
    """The image-text pairs of one folder of shards, addressed by (shard, row). Files are opened on first use and read
    with ``pread``, so an object may be forked, pickled to workers and used by several threads."""

    def __init__(self, folder: Path, shards: list[IndexedShard]):
        self.folder, self._shards = folder, shards
        self.shard_counts = tuple(shard.samples for shard in shards)
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return sum(self.shard_counts)

    @property
    def landmark(self) -> Path:
        """The file that names all others."""
        return self.folder / "index.json"

    @property
    def digest(self) -> str:
        """The SHA-256 of the shards' names, sizes and numbers of samples."""
        return hashlib.sha256(json.dumps([asdict(shard) for shard in self._shards]).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardDataset, (self.folder, self._shards)  # the open files stay behind

    def _open(self, number: int) -> _Shard:
        shard = self._shards[number]
        return _Shard(self.folder / shard.file, shard.samples, shard.bytes, _remedy(self.folder))

    def name(self, shard: int, row: int) -> str:
        """Return the sample's ``id`` without reading it, so that a log can name one that cannot be read."""
        return f"{self._shards[shard].file.removesuffix('.tar')}/{self._shard(shard).keys[row]}"

    def read(self, shard: int, row: int) -> RawSample:
        """Read a sample without decoding it. Raises ``BadSample`` if its bytes are not there any more or its metadata
        is no JSON, ``UserError`` if the side-car does not fit the tar."""
        opened, meta = self._shard(shard), self.meta(shard, row)
        image_at, image_size, caption_at, caption_size, _, _ = opened.spans[row].tolist()
        caption = decode_text(opened.pread(caption_at, caption_size)) if caption_size else caption_of(meta)
        image = opened.pread(image_at, image_size)
        return RawSample(opened.keys[row], image, caption, meta, self.name(shard, row))

    def meta(self, shard: int, row: int) -> dict[str, Any]:
        """Read only the metadata of a sample, not its image. It raises what ``read`` raises."""
        opened = self._shard(shard)
        at, size = opened.spans[row, 4:].tolist()
        return parse_meta(opened.pread(at, size)) if size else {}


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of shards of the data set at ``root`` by split: its train/ and test/. If shards lie in
    ``root`` itself and there is no train/, they are the train split. All commands and launchers follow this rule."""
    splits = {name: root / name for name in ("train", "test") if holds_shards(root / name)}
    return {"train": root} | splits if "train" not in splits and holds_shards(root) else splits


def split_folder(root: str | Path, split: str) -> Path:
    """Return the folder of one split of the data set at ``root``. ``UserError`` if there is none."""
    root = refuse_remote(root)
    splits = split_folders(root)
    folder = splits.get(split, root / split)
    if root.is_dir() and not folder.is_dir():
        if not splits:
            raise no_tars(root)
        raise UserError(
            f"{root} has no {split} split, only {' and '.join(splits)}; choose one of these, or make shards in {folder}"
        )
    return folder


def open_dataset(folder: str | Path) -> ShardDataset:
    """Open an indexed folder of shards, e.g. ROOT/train. ``UserError``, with the command to run, when the folder, its
    index or a shard is missing or has changed."""
    folder = refuse_remote(folder)
    if not folder.is_dir():
        make = f"python tools/prepare_data.py emoji --out {folder.parent}"
        raise UserError(f"data folder {folder} does not exist; make one with: {make}")
    remedy = _remedy(folder)
    if not holds_shards(folder):
        raise no_tars(folder)
    index = read_json(folder / "index.json", FolderIndex, remedy)
    names = [shard.file for shard in index.shards]
    if not names or len(set(names)) < len(names) or index.total != sum(shard.samples for shard in index.shards):
        raise UserError(f"{folder / 'index.json'} is damaged or empty; {remedy}")
    with ThreadPoolExecutor(_LOOKS) as pool:
        sizes = dict(pool.map(_sized, folder.glob("*.tar")))
    for shard in index.shards:
        if sizes.get(shard.file) != shard.bytes:
            raise UserError(f"{folder / shard.file} is missing or has changed since it was indexed; {remedy}")
        if shard.samples * _LEAST_SAMPLE > shard.bytes:  # memory for all would be allocated before one is read
            raise UserError(f"{folder / shard.file} is too small for {shard.samples} samples; {remedy}")
    return ShardDataset(folder, index.shards)


def _sized(path: Path) -> tuple[str, int | None]:
    try:
        return path.name, path.stat().st_size
    except OSError:  # such as a link to nowhere
        return path.name, None


def _remedy(folder: Path) -> str:
    return f"index it with: python tools/prepare_data.py index {folder}"
