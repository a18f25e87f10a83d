"""Find the samples of a tar file by its headers alone, and trust none of them."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megavtp.data.report import SkipReport
from megavtp.data.sample_text import encodable
from megavtp.errors import UserError

DAMAGED = "truncated or damaged tar"
_BLOCK = 512
_MAX_HEADER = 1 << 20  # bytes of one header; PAX headers of honest files have a few hundred
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class TarSample:
    """The members that share a key: extension (lower case, without the dot) -> (offset, size) in bytes. ``before_cut``
    marks the last sample before a damaged place, which may have lost members."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    before_cut: bool = False


def holds_shards(folder: Path) -> bool:
    return (folder / "index.json").exists() or any(folder.glob("*.tar"))


def find_tars(folder: Path) -> list[Path]:
    """Return the ``*.tar`` of a folder, sorted. ``UserError`` if there is none, or if one is no file: opening a pipe
    would block."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise no_tars(folder)
    if strange := next((path for path in tars if not path.is_file()), None):
        raise UserError(f"{strange} is not a file; move it out of the folder of shards, or rename it")
    return tars


def no_tars(folder: Path) -> UserError:
    """Return the error for a folder without ``*.tar``, which says what to do."""
    compressed = sorted(path.name for path in folder.glob("*") if path.name.endswith(_COMPRESSED))
    if compressed:
        return UserError(
            f"{folder} holds compressed tars ({compressed[0]}), which have no random access; unpack them first "
            f"(gunzip, unxz, ...), then: python tools/prepare_data.py index {folder}"
        )
    make = "python tools/prepare_data.py images --from ... --out ..."
    return UserError(f"no .tar shards in {folder}; make some with: {make}")


class _HeaderFile(io.FileIO):
    """Refuses the huge single reads that a forged long-name or PAX header asks for."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"header of {size} bytes")
        return super().read(size)


def scan_tar(path: Path, report: SkipReport) -> Iterator[TarSample]:
    """Yield the samples of an uncompressed tar in file order: runs of members whose names agree up to the first dot.

    Members that are neither a plain file nor a folder, or have no extension, are skipped. A truncated or damaged tar
    yields the samples before the damage. ``report`` counts everything that is skipped. Raises ``UserError`` for a
    compressed tar and for absolute or ``..`` member names (a tar made to do harm).
    """
    size = path.stat().st_size
    damage_before = report.reasons[DAMAGED]
    current: TarSample | None = None
    cut_key: str | None = None
    with _HeaderFile(path) as file:
        _refuse_compressed(file, path)
        for info in _headers(file, size, path, report):
            _refuse_escape(info.name, path)
            if info.isdir():
                continue
            key, extension = _split(info.name)
            if not info.isreg() or info.issparse() or not extension:
                report.skip("not a plain file with an extension", f"{path.name}: {info.name}")
                continue
            if info.offset_data + info.size > size:
                report.skip(DAMAGED, f"{path.name} at byte {info.offset_data}, in {info.name}")
                cut_key = key
                break
            if current is None or current.key != key:
                if current is not None:
                    yield current
                current = TarSample(key)
            current.members.setdefault(extension, (info.offset_data, info.size))
    if current is None:
        return
    if current.key == cut_key:
        report.skip("sample cut off by the end of the tar", f"{path.name}: {current.key}")
    else:
        current.before_cut = report.reasons[DAMAGED] > damage_before
        yield current


def _headers(file: _HeaderFile, size: int, path: Path, report: SkipReport) -> Iterator[tarfile.TarInfo]:
    """Yield the headers until the end mark; the first invalid one ends them, and is noted in the report."""
    end = 0  # where the next header has to be at the earliest
    try:
        tar = tarfile.open(fileobj=file, mode="r:", errorlevel=0)
        while (info := tar.next()) is not None:
            if info.size < 0 or info.offset_data < end:
                raise tarfile.ReadError(f"absurd header at byte {info.offset}")
            end = info.offset_data + info.size
            yield info
            tar.members = []  # type: ignore[attr-defined]  # a public list that the stubs lack; it would only grow
        end = max(end, tar.offset)
    except Exception as error:  # tarfile raises nearly anything on forged headers, RecursionError for many in a row
        # Past the end of the file is the plain truncation that scan_tar reports by the member's name.
        if end <= size:
            report.skip(DAMAGED, f"{path.name} near byte {end}: {error}")
        return
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        report.skip(DAMAGED, f"{path.name} near byte {end}: no end mark")


def _split(name: str) -> tuple[str, str]:
    """Split by WebDataset's rule, at the first dot of the base name: "a/b.seg.PNG" -> ("a/b", "seg.png")."""
    folder, slash, base = encodable(name).rpartition("/")  # half surrogate pairs stand for bytes that are no UTF-8
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if stem else ""


def _refuse_escape(name: str, path: Path) -> None:
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\x00" in name:
        raise UserError(f"{path}: refused, member {name!r} points outside of the tar; make the shard anew")


def _refuse_compressed(file: _HeaderFile, path: Path) -> None:
    magic = file.read(6)
    file.seek(0)
    if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise UserError(f"{path}: a compressed tar has no random access; unpack it first (gunzip, unxz, ...)")
