"""One file of somebody else's weights: safetensors, or torch's own form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from megavtp.data.torch_file import read_torch_file
from megavtp.errors import UserError


def read_weights_file(path: Path, otherwise: str, remedy: str) -> dict[str, Any]:
    """The dictionary in the file.

    UserError, which ends with ``remedy``, when it is damaged, or holds something else (``otherwise`` says what that
    makes of it).
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); {remedy}") from None
    tree = read_torch_file(path, remedy)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, {otherwise}; {remedy}")
    return tree
