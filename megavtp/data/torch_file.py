"""Files of ``torch.save`` that other projects exchange: read with ``weights_only``, written from plain tensors."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from megavtp.errors import UserError


def read_torch_file(path: str | Path, remedy: str) -> Any:
    """Tensors and plain containers of a ``.pt`` file, on the host; large ones stay on the disk until they are read.

    Nothing in the file can run: a pickle that asks for any other object is a ``UserError`` that names it and ends in
    ``remedy``, as are files that are missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than tensors ({_reason(error)}); {remedy}") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AssertionError) as error:
        if "mmap can only be used with files saved with" not in str(error):
            raise UserError(f"{path} is no whole file of torch.save ({_first_line(error)}); {remedy}") from None
    return _read_old_form(path, remedy)


def _read_old_form(path: str | Path, remedy: str) -> Any:
    """The form before torch 1.6, which cannot be mapped; a text file or anything else ends here too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a file is of an unusual form is said by the error, if it matters
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it is no file of tensors ({_reason(error)}); {remedy}") from None
    except Exception as error:  # the old reader raises whatever the bytes lead it to
        raise UserError(f"{path} is no whole file of torch.save ({_first_line(error)}); {remedy}") from None


def write_torch_file(path: str | Path, tree: dict[str, Any]) -> None:
    """Write tensors in nested dicts so that any ``torch.load`` reads them; beside ``path``, then renamed into place.

    The one place that writes this form: what must be exchanged with other projects. Raises OSError.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(tree, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """What the pickle asked for, out of torch's page of advice."""
    line = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), None)
    return " ".join((line or _first_line(error)).split())[:200]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
