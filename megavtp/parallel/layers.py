"""Tensor-parallel layers (Megatron-LM, arXiv 1909.08053). With tp = 1 each is its plain torch counterpart.

A forward is given ``cut`` under sequence parallelism: the linear layers of a block then take in and give out this
rank's rows of the packed tokens.

Weights are created uninitialised in the local shape; the model's initialiser fills them (see ``models/init.py``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.parallel.collectives import copy_to_tp, reduce_from_tp, scatter_to_tp
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sequence import TokenCut, on_own_rows
from megavtp.parallel.sharding import Shard, mark


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the outputs cut over tp: (..., in) -> (..., out / tp); with ``cut`` (n, in) -> (k, out / tp).

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
        self.bias = nn.Parameter(torch.empty(out_features // mesh.tp)) if bias else None
        for parameter in self.parameters():
            mark(parameter, Shard(0, parts))

    def forward(self, x: Tensor, cut: TokenCut | None = None) -> Tensor:
        if self.copy_input:
            x = enter(x, self.mesh, cut)
        return F.linear(x, self.weight, self.bias)


def enter(x: Tensor, mesh: Mesh, cut: TokenCut | None) -> Tensor:
    """Prepare the input of column-parallel layers: its gradient is summed over tp; ``cut`` gathers all tokens."""
    x = x.to(compute_dtype_of(x))  # cast once and before it is sent; the product would cast after that
    return copy_to_tp(x, mesh) if cut is None else cut.gather(x)


def compute_dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype to which a matrix product casts x under the present autocast."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def joint_linear(x: Tensor, *layers: ColumnParallelLinear) -> Tensor:
    """Compute all ``layers`` on the same entered input in one product: (..., in) -> (..., sum of out / tp).

    Joining the weights costs a copy of them. It is for recomputation, which repeats all that precedes the last use of
    the input: with a product for each layer, that is all products but the last.
    """
    weight = torch.cat([layer.weight.to(x.dtype) for layer in layers])
    biases = [layer.bias.to(x.dtype) for layer in layers if layer.bias is not None]
    return F.linear(x, weight, torch.cat(biases) if biases else None)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the inputs cut over tp and the output whole on every rank: (..., in / tp) -> (..., out); with
    ``cut`` (k, in / tp) -> (n, out).

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

    def forward(self, x: Tensor, cut: TokenCut | None = None) -> Tensor:
        if not self.input_is_parallel:
            x = scatter_to_tp(x, self.mesh)
        if self.mesh.tp == 1:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight)
        y = reduce_from_tp(y, self.mesh) if cut is None else cut.reduce(y)
        if self.bias is None:
            return y
        return y + on_own_rows(self.bias, cut).to(y.dtype)  # the bias is added once, after the sum


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
