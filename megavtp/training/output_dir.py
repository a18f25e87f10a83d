"""The folder that a run writes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavtp.config.load import to_yaml
from megavtp.data.files import write_atomic
from megavtp.errors import UserError


def open_output_dir(config: Any, is_main: bool) -> None:
    """Make ``output_dir`` and, on the main rank, write ``config.yaml``; before the model, so that a bad path is found
    early. UserError if it cannot be written."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main:
            write_atomic(folder / "config.yaml", to_yaml(config).encode())
    except OSError as error:
        raise UserError(f"output_dir = {folder} cannot be written ({error.strerror}); set another one") from None
