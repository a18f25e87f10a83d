"""Options of tools and launchers: one line says what cannot work, before anything is loaded or written.

This file is light to import, as a tool parses its options before it loads torch.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megavtp.errors import UserError, is_text

N = TypeVar("N", int, float)
_PATIENCE = 15.0  # seconds that the first process has to print the error, before the launcher ends all processes


class Options(argparse.ArgumentParser):
    """A parser whose errors are one line, which only the first process of a launcher prints."""

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if not is_text(word):
                self.error(f"{word!r} holds bytes that are no UTF-8 text; rename what it names")
            if not word or (word.startswith("--") and word.endswith("=")):
                self.error(f"{word!r} is empty where a value belongs; leave the option out, or give it one")
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse; settings may stand anywhere, of which argparse would take only those that stand together."""
        options, rest = self.parse_known_args(args, namespace)
        settings = [word for word in rest if "=" in word and not word.startswith("-")]
        if settings != rest or (rest and not hasattr(options, "overrides")):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if settings:
            options.overrides += settings
        return options

    def error(self, message: str) -> NoReturn:
        if not _first_process():
            time.sleep(_PATIENCE)  # a launcher ends all processes as soon as one has ended
        self.exit(2, f"error: {UserError(message)}; see --help\n")


def _first_process() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return the type of an option that takes whole numbers from ``low`` to ``high``."""
    return _number(int, f"a whole number from {low:,} to {high:,}", lambda value: low <= value <= high)


def real(low: float, high: float, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """Return the type of an option of numbers from ``low`` to ``high``; ``above`` and ``below`` exclude ends."""
    wanted = f"a number {'above' if above else 'at least'} {low:g} and {'below' if below else 'at most'} {high:g}"
    excluded = [end for end, is_excluded in ((low, above), (high, below)) if is_excluded]
    return _number(float, wanted, lambda value: low <= value <= high and value not in excluded)


def _number(kind: Callable[[str], N], wanted: str, is_valid: Callable[[N], bool]) -> Callable[[str], N]:
    def number(text: str) -> N:
        with suppress(ValueError):
            if is_valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text[:40]!r}")

    return number


def place(text: str) -> Path:
    """Parse an option that names a file or folder to read. The code that reads it reports a missing one."""
    _exists(Path(text))
    return Path(text)


def place_name(text: str) -> str:
    """Parse an option that may name a place or something else, such as "clip"."""
    return str(place(text))


def new_file(*suffixes: str) -> Callable[[str], Path]:
    """Return the type of an option that names a file to write, with one of ``suffixes``, or any if none is given."""

    def file(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(suffixes)}")
        if _exists(path) and path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
        _try_to_write(path.parent, text)
        return path

    return file


def new_folder(text: str) -> Path:
    """Parse an option that names a folder to make, or to resume in."""
    path = Path(text)
    if _exists(path) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    _try_to_write(path, text)
    return path


def new_path(text: str) -> Path:
    """Parse an option that names a new file or folder."""
    path = Path(text)
    is_new = not _exists(path) or (path.is_dir() and not any(path.iterdir()))
    if path.is_symlink() or not is_new:
        raise argparse.ArgumentTypeError(f"{text} exists; choose another place, or remove it first")
    _try_to_write(path.parent, text)
    return path


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be reached ({error.strerror}); choose another place") from None
    return True


def _try_to_write(folder: Path, text: str) -> None:
    """Refuse a ``folder`` that cannot be made or written to; nothing is left behind.

    Only an attempt shows it: permissions do not apply to root, and the disk may be full. The first process writes.
    """
    if not _first_process():
        return
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"x")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written ({error.strerror}); choose another place") from None


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options of a tool that one process runs or several share."""
    parser.add_argument("--device", default="auto", help="of a single process: auto, cpu, cuda or cuda:N")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher


# Types of options that several tools have.
WORKERS = whole(0, 1024)  # processes on one machine
IMAGES = whole(1, 10_000_000)  # a number of them; each is an entry of a list
BATCH = whole(1, 65_536)
PIXELS = whole(1, 16_384)  # of an image's side
BAD = whole(0, 1_000_000_000)  # samples that may be left out
SEED = whole(0, 2**63 - 1)
