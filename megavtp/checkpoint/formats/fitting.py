"""Do tensors fit a model? Every fault is found before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megavtp.data.torch_file import no_floats
from megavtp.errors import UserError


def faults(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """All that is missing, unexpected, of another shape than ``shapes`` says, or no weights; empty when all fits."""
    found = [f"missing {name}" for name in shapes if name not in tensors]
    found += [f"unexpected {name}" for name in tensors if name not in shapes]
    return found + misshapen(tensors, shapes) + no_floats(tensors)


def misshapen(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Tensors that ``shapes`` knows with another shape."""
    return [
        f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and list(tensors[name].shape) != list(shape)
    ]


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """UserError that lists all ``faults``."""
    if found := faults(tensors, shapes):
        raise UserError(f"{what} does not fit its model config: {'; '.join(found)}")
