"""Files of ``torch.save`` that other projects exchange: read with ``weights_only``, written from plain tensors."""

import os
import pickle
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.data.files import replaced
from megavtp.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # dtypes that weights of other projects may have


def read_torch_file(path: str | Path, remedy: str) -> Any:
    """Read tensors and plain containers of a ``.pt`` file to the host; large ones stay on the disk until they are used.
    Nothing in the file can run. A ``UserError``, which ends in ``remedy``, refuses a pickle that asks for any other
    object, a file that is missing or damaged, and tensors whose numbers are not in the file."""
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    refusal = "it holds more than tensors"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # if an unusual form of the file matters, the error says so
            try:
                tree = load(mmap=True)
            except RuntimeError as error:
                if "mmap can only be used with files saved with" not in str(error):
                    raise
                refusal = "it is no file of tensors"  # if it has not the form before torch 1.6, which cannot be mapped
                tree = load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {refusal} ({_reason(error)}); {remedy}") from None
    except Exception as error:  # torch raises whatever the bytes lead it to
        raise UserError(f"{path} is no whole file of torch.save ({_first_line(error)}); {remedy}") from None
    _check_tensors(tree, path, remedy)
    return tree


def _check_tensors(tree: Any, path: str | Path, remedy: str) -> None:
    """Refuse a tensor with more numbers than the file holds: strides of 0 make one of any size. UserError."""
    file_size, seen = os.path.getsize(path), set()
    waiting = [("the tensor", tree)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            plain = value.device.type == "cpu" and value.layout == torch.strided
            if not plain or value.is_quantized or value.is_nested or value.is_neg() or value.is_conj():
                raise UserError(f"{path} is refused: {name} is no plain tensor (it is {_kind(value)}); {remedy}")
            if not value.numel() * value.element_size() <= value.untyped_storage().nbytes() <= file_size:
                raise UserError(
                    f"{path} is refused: {name} has the shape {list(value.shape)}, more numbers than are in the file; "
                    f"{remedy}"
                )
        elif id(value) not in seen and isinstance(value, (dict, list, tuple, set)):
            seen.add(id(value))
            waiting += value.items() if isinstance(value, dict) else ((name, inner) for inner in value)


def _kind(tensor: Tensor) -> str:
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device}"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "quantised, nested or a view that changes signs"


def no_floats(tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors whose dtype weights cannot have: integers and 8-bit floats lack the scale that they need."""
    return [f"{name} is of {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]


def write_torch_file(path: str | Path, tree: dict[str, Any]) -> None:
    """Write tensors in nested dicts, whole or not at all, so that any ``torch.load`` reads them. Raises OSError. Only
    files that are exchanged with other projects have this form, and all of them are written here."""
    with replaced(Path(path)) as beside, open(beside, "wb") as file:
        torch.save(tree, file)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    """Extract from torch's long message what the pickle asked for."""
    line = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), None)
    return " ".join((line or _first_line(error)).split())[:200]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
