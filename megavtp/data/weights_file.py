"""A file of weights from another project, as safetensors or in torch's own form."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megavtp.data.torch_file import read_torch_file
from megavtp.errors import UserError


def read_weights_file(path: Path, otherwise: str, remedy: str) -> dict[str, Any]:
    """Read the dictionary in the file. No tensor in it claims more numbers than the file holds. A ``UserError``, which
    ends with ``remedy``, refuses a damaged file, and one that holds something else; ``otherwise`` says what that means.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path, remedy)
    tree = read_torch_file(path, remedy)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, {otherwise}; {remedy}")
    return tree


def read_safetensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read all its tensors, of whatever dtype. UserError, which ends with ``remedy``: it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"the weights {path} do not exist; {remedy}") from None
    except Exception as error:  # besides its own error, the library raises whatever its header leads it to
        raise UserError(f"{path} is not a whole safetensors file ({error}); {remedy}") from None
