"""Tensor-parallel layers (Megatron-LM, arXiv 1909.08053). With tp = 1 each is its plain torch counterpart.

Weights are created uninitialised in the local shape; the model's initialiser fills them (see ``models/init.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.parallel.collectives import copy_to_tp, reduce_from_tp, scatter_to_tp
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sharding import Shard, mark


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the outputs cut over tp: (..., in) -> (..., out / tp).

    ``parts``: number of equal blocks along the outputs that are cut on their own (3 for fused q, k, v).
    ``copy_input``: False when the caller has already put x through ``copy_to_tp``, so that several layers that read
    the same x share one reduction of its gradient.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, mesh: Mesh = SINGLE, parts: int = 1,
        copy_input: bool = True,
    ):
        super().__init__()
        self.mesh = mesh
        self.copy_input = copy_input
        self.weight = nn.Parameter(torch.empty(out_features // mesh.tp, in_features))
        mark(self.weight, Shard(0, parts))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features // mesh.tp))
            mark(self.bias, Shard(0, parts))

    def forward(self, x: Tensor) -> Tensor:
        if self.copy_input:
            x = copy_to_tp(x, self.mesh)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the inputs cut over tp and the output whole on every rank.

    ``input_is_parallel``: x is (..., in / tp), as a column-parallel layer leaves it; otherwise x is whole.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, mesh: Mesh = SINGLE,
        input_is_parallel: bool = True,
    ):
        super().__init__()
        self.mesh = mesh
        self.input_is_parallel = input_is_parallel
        self.weight = nn.Parameter(torch.empty(out_features, in_features // mesh.tp))
        mark(self.weight, Shard(1))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            x = scatter_to_tp(x, self.mesh)
        if self.mesh.tp == 1:
            return F.linear(x, self.weight, self.bias)
        y = reduce_from_tp(F.linear(x, self.weight), self.mesh)  # the bias is added once, after the sum
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabParallelEmbedding(nn.Module):
    """A table (num, dim) whose rows are cut over tp: ids (...) -> (..., dim), whole on every rank."""

    def __init__(self, num: int, dim: int, *, mesh: Mesh = SINGLE):
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(torch.empty(num // mesh.tp, dim))
        mark(self.weight, Shard(0))

    def forward(self, ids: Tensor) -> Tensor:
        if self.mesh.tp == 1:
            return F.embedding(ids, self.weight)
        rows = self.weight.shape[0]
        local = ids - self.mesh.tp_rank * rows
        foreign = (local < 0) | (local >= rows)
        out = F.embedding(local.masked_fill(foreign, 0), self.weight).masked_fill(foreign.unsqueeze(-1), 0.0)
        return reduce_from_tp(out, self.mesh)
