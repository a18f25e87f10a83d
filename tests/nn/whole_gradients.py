"""Gradients of a module whose weights are cut over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megavtp.parallel.collectives import all_gather
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.sharding import merge, shard_of


def whole_gradients(module: nn.Module, mesh: Mesh) -> dict[str, Tensor]:
    """Of every parameter, put together; those that each rank holds whole must be the same on all."""
    found = {}
    for name, parameter in module.named_parameters():
        pieces = all_gather(parameter.grad[None], mesh, "tp").unbind()
        assert all(torch.equal(pieces[0], piece) for piece in pieces) or shard_of(parameter) is not None, name
        found[name] = merge(pieces, shard_of(parameter))
    return found
