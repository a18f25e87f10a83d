"""Records what a process does with files, for tests that count it."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavtp.checkpoint import reading
from megavtp.latents import folder

LISTINGS = ("listdir", "scandir")


def record(under: Path) -> list[tuple[str, str]]:
    """Return a list that from now on gets (operation, path) of all that this process opens, lists or asks facts of."""
    found: list[tuple[str, str]] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(under):
                found.append((name, os.fspath(path)))
            return function(path, *rest, **options)

        return call

    for module, names in (
        (os, ("stat", "lstat", "open", *LISTINGS)), (builtins, ("open",)), (reading, ("safe_open",)),
        (folder, ("safe_open",)),
    ):
        for name in names:
            setattr(module, name, watched(name, getattr(module, name)))
    return found
