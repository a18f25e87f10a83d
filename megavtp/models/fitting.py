"""Whole tensors are checked against a model here: every misfit is found before anything is loaded or written."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from megavtp.data.torch_file import no_floats
from megavtp.errors import UserError
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.sharding import cut, shard_of, whole_shape

Shapes = Mapping[str, Sequence[int]]


def misfits(tensors: Mapping[str, Tensor], shapes: Shapes, required: Collection[str] | None = None) -> list[str]:
    """List all tensors that are missing, unexpected or of another shape than ``shapes`` says.

    ``required`` has the names that must be there; None = all of ``shapes``.
    """
    found = [f"missing {name}" for name in (shapes if required is None else required) if name not in tensors]
    found += [f"unexpected {name}" for name in tensors if name not in shapes]
    return found + [
        f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items() if name in tensors and list(tensors[name].shape) != list(shape)
    ]


def faults(tensors: Mapping[str, Tensor], shapes: Shapes, required: Collection[str] | None = None) -> list[str]:
    """List the ``misfits`` and the tensors that are not of floats."""
    return misfits(tensors, shapes, required) + no_floats(tensors)


def check(tensors: Mapping[str, Tensor], shapes: Shapes, what: str, required: Collection[str] | None = None) -> None:
    if found := faults(tensors, shapes, required):
        raise UserError(f"{what} does not fit its model config: {'; '.join(found)}")


def load_whole(model: nn.Module, tensors: Mapping[str, Tensor], mesh: Mesh, required: Collection[str]) -> None:
    """Copy whole (uncut) tensors into this rank's slices, by logical name. For ``required`` see ``misfits``.

    UserError lists all ``faults``; then nothing is copied.
    """
    own = model.state_dict(keep_vars=True)
    shapes = {name: whole_shape(tensor.shape, shard_of(tensor), mesh.tp) for name, tensor in own.items()}
    check(tensors, shapes, "the set of weights", required)
    copy_whole(own, tensors, mesh)


def copy_whole(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Fill this rank's ``own`` tensors from the whole ones of the same names."""
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(cut(tensors[name], shard_of(own[name]), mesh.tp_rank, mesh.tp))
