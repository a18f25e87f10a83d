"""Small file helpers. Paths are local, and no file is ever half-written under its final name."""

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavtp.errors import UserError


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``. The file that is written there takes the place of ``path`` if the block ends
    without an error, so readers see all or nothing; else it is deleted, which gives the space back."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_atomic(path: Path, data: bytes, flush: bool = False) -> None:
    """Write a file whole or not at all; ``flush`` it to the disk before it is to be seen."""
    with replaced(path) as partial, open(partial, "wb") as file:
        file.write(data)
        if flush:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    separators = (",", ":") if indent is None else None
    write_atomic(path, json.dumps(value, indent=indent, separators=separators).encode() + b"\n")


def find_installed(package: str, inside: str | os.PathLike) -> Path | None:
    """Find a file or folder inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = [Path(folder, inside) for folder in spec.submodule_search_locations or ()] if spec else []
    return next((place for place in places if place.exists()), None)


def refuse_hub_id(spec: str | os.PathLike) -> Path:
    """Return a local path where weights may lie. ``UserError`` for what is meant as a model's name on a hub."""
    path = Path(spec)
    hub_id = re.fullmatch(r"(?:hf-hub:|hf:/{1,2}|https:/{1,2}huggingface\.co/)?[\w.-]+/[\w.-]+", os.fspath(spec))
    if hub_id and not path.exists() and not path.parent.is_dir():
        raise UserError(
            f"{os.fspath(spec)} is no folder here; if it is a model's name on a hub: nothing is downloaded, fetch its "
            "folder yourself and give the path"
        )
    return path


def refuse_remote(spec: str | os.PathLike) -> Path:
    """Return a local path. ``UserError`` for pipes and URLs, which other loaders would run or fetch."""
    text = os.fspath(spec)
    if text.startswith("pipe:") or "://" in text:
        raise UserError(f"{text!r} is not a local path; pipes and URLs are not opened: copy the files here first")
    return Path(text)
