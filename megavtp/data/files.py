"""Small file helpers. Paths are local, and no file is ever half-written under its final name."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from megavtp.errors import UserError


def write_atomic(path: Path, data: bytes, flush: bool = False) -> None:
    """Write beside ``path`` and rename into place, so readers see all or nothing. ``flush`` it to the disk first."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()  # give the space back
        raise


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    separators = (",", ":") if indent is None else None
    write_atomic(path, json.dumps(value, indent=indent, separators=separators).encode() + b"\n")


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
