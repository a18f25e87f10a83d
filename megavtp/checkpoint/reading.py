"""This reads checkpoint folders: it verifies them, gives their content, and finds the newest intact one."""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavtp.checkpoint.tensor_file import DTYPE_NAMES
from megavtp.config.load import from_dict
from megavtp.errors import UserError
from megavtp.json_file import Count, check_form, form, parse_json

FORMAT, VERSION = "megavtp-checkpoint", 1
INDEX = "checkpoint.json"
LATEST = "latest"  # the name of the link to the newest checkpoint
STEP_FOLDER = re.compile(r"step-(\d{8,})(\.replaced-.+)?")  # the second form is an intact one that was being replaced
_STEP_IN_NAME = re.compile(r"step-(\d{8,})(?:\.|$)")
UNFINISHED = re.compile(r"step-(\d{8,})\.(partial|deleting)-(.+)")
_TENSOR_FILE = re.compile(r"tensors-\d{5}\.safetensors")  # nothing else is opened, so an index cannot name ../secrets
_HASHERS = 8  # threads; hashlib releases the interpreter lock
_OTHER = "use another checkpoint"
_CODES = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_NAMES.items()}
_Dtype = Annotated[str, Field(pattern=f"^({'|'.join(_CODES)})$")]

T = TypeVar("T")
R = TypeVar("R")
Verify = bool | Literal["sizes"]
log = logging.getLogger(__name__)


@form
class FileFacts:
    size: Count
    sha256: str


@form
class TensorFacts:
    file: str
    shape: list[Count]
    dtype: _Dtype


@form
class Contribution:
    """What one writer records of its file and of its tensors, by name."""

    files: dict[str, FileFacts]
    tensors: dict[str, TensorFacts]


@form
class Index(Contribution):
    """The content of ``checkpoint.json``."""

    format: Literal["megavtp-checkpoint"]
    version: Literal[1]
    step: Count
    meta: dict[str, Any]
    digest: str


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def named_step(folder: str) -> int | None:
    named = _STEP_IN_NAME.match(folder)
    return int(named[1]) if named else None


def digest_of(index: dict[str, Any]) -> str:
    """Return the SHA-256 of the index without its own ``digest`` field."""
    rest = {key: value for key, value in index.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Checkpoint:
    """An open, verified checkpoint, whose tensors are read from disk when they are asked for.

    While it is open (until ``close``, the end of a ``with`` block, or collection) a shared lock keeps other processes
    from pruning it. It can be sent to other processes, which have no lock of their own (None) and read no index.
    """

    def __init__(self, path: Path, index: Index, lock: BinaryIO | None = None):
        self.path = path
        self._index = index
        self.step = index.step
        self.meta = index.meta
        self._tensors = index.tensors
        # What the index records, by file.
        self._told: dict[str, dict[str, tuple[str, list[int]]]] = {file: {} for file in index.files}
        for name, tensor in index.tensors.items():
            self._told[tensor.file][name] = (_CODES[tensor.dtype], tensor.shape)
        self._handles: dict[str, Any] = {}
        self._lock = lock

    def __reduce__(self) -> tuple[Any, ...]:
        return Checkpoint, (self.path, self._index)  # the open files stay behind

    @property
    def landmark(self) -> Path:
        """The file that describes all others."""
        return self.path / INDEX

    @property
    def digest(self) -> str:
        return self._index.digest

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._entry(name).dtype)

    def tensor(self, name: str) -> Tensor:
        """Read the whole tensor into host memory."""
        file = self._entry(name).file
        if file not in self._handles:
            self._handles[file] = self._open(file)
        return self._handles[file].get_tensor(name)

    def fact(self, name: str, expected: type[T]) -> T:
        """Return an entry of the metadata in the expected form, see ``json_file``. UserError if it does not have it."""
        return check_form(self.meta.get(name), expected, f"{self.path}: its meta.{name}", _OTHER)

    def config(self, root: type[T], checked: Callable[[T], R]) -> R:
        """Return ``checked`` of the configuration of the run that wrote this. UserError: it refuses it, or it is no
        ``root``."""
        try:
            return checked(from_dict(self.fact("config", dict[str, Any]), root))
        except UserError as error:
            raise UserError(f"{self.path}: its configuration cannot be used: {error}; {_OTHER}") from None

    def close(self) -> None:
        self._handles.clear()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _entry(self, name: str) -> TensorFacts:
        if name not in self._tensors:
            raise UserError(f"{self.path}: no tensor {name!r} in this checkpoint; was it saved by another recipe?")
        return self._tensors[name]

    def _open(self, file: str) -> Any:
        """Open a file and check that its header describes the tensors as the index does, which no digest guarantees."""
        path = self.path / file
        try:
            handle = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {_OTHER}") from error
        slices = {name: handle.get_slice(name) for name in handle.keys()}
        found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        if found != (told := self._told[file]):
            wrong = sorted(name for name in found.keys() | told.keys() if found.get(name) != told.get(name))
            raise UserError(f"{path}: {INDEX} tells something else of its tensor {wrong[0]!r}; {_OTHER}")
        return handle

    def check_headers(self) -> None:
        """Open every file once, as for reading a tensor. UserError if one does not hold what the index says."""
        for file in self._told:
            self._open(file)


def open_checkpoint(path: str | Path, verify: Verify = True) -> Checkpoint:
    """Open one checkpoint folder.

    The name ``latest`` opens the newest folder beside it that verifies, wherever the link leads: a run may have been
    killed before it was set. Each one that is skipped is logged with the reason.

    ``verify``: True compares every file's size, SHA-256 and header with the index. "sizes" (or False) compares only the
    sizes, and the header of each file that is read; it is for a checkpoint whose hashes have just been compared.
    Raises UserError that names the bad file and the remedy.
    """
    path = Path(path)
    if path.name == LATEST and (newest := _newest_intact(path.parent, verify)) is not None:
        return newest[1]
    path = path.resolve()
    lock, index = _read_index(path)
    checkpoint = Checkpoint(path, index, lock)
    try:
        _check_sizes(path, index)
        if verify is True:
            _check_hashes(path, index)
            checkpoint.check_headers()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def find_latest(root: str | Path, verify: Verify = True, last: int | None = None) -> Path | None:
    """Find the newest checkpoint under ``root`` that verifies and is not of a later step than ``last``.

    Each one that is skipped is logged with the reason.
    """
    root = Path(root)
    latest = math.inf if last is None else last
    folder, step = None, -1
    if (found := _newest_intact(root, verify, latest)) is not None:
        folder, step = found[0], found[1].step
        found[1].close()
    for entry in root.iterdir() if root.is_dir() else ():
        match = UNFINISHED.fullmatch(entry.name)
        if match and match[2] == "partial" and step < int(match[1]) <= latest:
            log.warning("checkpoint skipped: %s: its writing was interrupted", entry)
    return folder


def _newest_intact(root: Path, verify: Verify, last: float = math.inf) -> tuple[Path, Checkpoint] | None:
    """Open the newest checkpoint of a step up to ``last`` that verifies; return its folder, too."""
    for step, folder in newest_first(root):
        if step <= last:
            try:
                return folder, open_checkpoint(folder, verify)
            except UserError as error:
                log.warning("checkpoint skipped: %s", error)
    return None


def newest_first(root: Path) -> Iterator[tuple[int, Path]]:
    """Give (step, folder) of every published checkpoint, intact or not, the newest first."""
    entries = root.iterdir() if root.is_dir() else ()
    matches = ((STEP_FOLDER.fullmatch(entry.name), entry) for entry in entries)
    found = [(int(match[1]), match[2] is None, entry) for match, entry in matches if match]
    return ((step, entry) for step, _, entry in sorted(found, reverse=True))


def has_checkpoints(root: str | Path) -> bool:
    """Tell whether ``root`` holds any published checkpoint, intact or not."""
    return any(newest_first(Path(root)))


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether ``path`` is for ``open_checkpoint``: a checkpoint, intact or not, or the ``latest`` of some."""
    path = Path(path)
    return (path / INDEX).is_file() or (path.name == LATEST and has_checkpoints(path.parent))


def try_exclusive(path: Path) -> int | None:
    """Lock a checkpoint and return the descriptor, which releases it when closed; None if somebody reads it."""
    try:
        descriptor = os.open(path / INDEX, os.O_RDWR)
    except OSError:
        return os.open(path, os.O_RDONLY)  # without a readable index nobody can have it open
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # the file system has no locks, so readers cannot be seen
    return descriptor


def _read_index(path: Path) -> tuple[BinaryIO, Index]:
    """Lock, read and check the index; return the locked file and the index."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder; check the path")
    try:
        file = open(path / INDEX, "rb")
    except FileNotFoundError:
        inside = sorted(entry.name for entry in path.iterdir() if STEP_FOLDER.fullmatch(entry.name))
        remedy = f"name one of the checkpoints in it, such as {path / inside[-1]}" if inside else "use another one"
        raise UserError(f"{path}: not a complete checkpoint, it has no {INDEX}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path / INDEX}: cannot be read ({error.strerror}); check its permissions") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: is just being deleted by the run that wrote it; use a newer one") from None
        except OSError:
            pass  # the file system has no locks: only the protection against pruning is missing
        return file, _parse_index(path / INDEX, file.read())
    except BaseException:
        file.close()
        raise


def _parse_index(path: Path, text: bytes) -> Index:
    index = parse_json(text, Index, str(path), _OTHER)
    if index.digest != digest_of(parse_json(text, dict[str, Any], str(path), _OTHER)):
        raise UserError(f"{path}: damaged (its content does not match its digest); {_OTHER}")
    for name in {*index.files, *(tensor.file for tensor in index.tensors.values())}:
        if not _TENSOR_FILE.fullmatch(name) or name not in index.files:
            raise UserError(f"{path}: names the unexpected file {name!r}; use a folder that MegaVTP wrote")
    if named_step(path.parent.name) not in (None, index.step):
        raise UserError(f"{path}: is of step {index.step}, the folder's name says another; rename the folder")
    return index


def _check_sizes(path: Path, index: Index) -> None:
    for name, facts in index.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise UserError(f"{path / name}: missing ({error.strerror}); {_OTHER}") from error
        if size != facts.size:
            raise UserError(f"{path / name}: has {size} bytes instead of {facts.size}; {_OTHER}")


def _check_hashes(path: Path, index: Index) -> None:
    def check(item: tuple[str, FileFacts]) -> None:
        name, facts = item
        try:
            with open(path / name, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path / name}: cannot be read ({error.strerror}); {_OTHER}") from error
        if actual != facts.sha256:
            raise UserError(f"{path / name}: damaged (SHA-256 differs); {_OTHER}")

    with ThreadPoolExecutor(_HASHERS) as pool:
        list(pool.map(check, index.files.items()))
