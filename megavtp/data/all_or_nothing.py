"""A result is written whole or not at all: beside its place, then renamed into it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megavtp.errors import UserError


@contextmanager
def all_or_nothing(out: str | Path) -> Iterator[Path]:
    """Yield a path beside ``out`` for a new folder or file; it becomes ``out`` if the block ends without an error, else
    nothing is left behind. ``UserError`` if ``out`` exists (an empty folder is replaced) or cannot be written."""
    out = Path(out)
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists; choose another --out, or remove it first")
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    missing = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # not there, or what should be a folder above it is a file
            partial.unlink()
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"{out} cannot be written ({reason}); choose another --out or free some space") from None
        raise
