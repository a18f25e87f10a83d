"""The two feed-forward networks: a gated one (SwiGLU, arXiv 2002.05202) and a plain MLP.

``expand`` is the first matrix product, ``contract`` all that follows it; see ``nn.block`` for ``cut``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.sizes import ffn_hidden
from megavtp.nn.split import share
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear, enter, joint_linear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sequence import TokenCut


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class _Gate(torch.autograd.Function):
    """silu(g) * v of the halves g, v of the last dimension. Keeps its input alone for the backward pass: what autograd
    would keep besides, silu(g), is half of that again, and cheap."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, value = hidden.chunk(2, -1)
        return _silu(gate) * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        gate, value = hidden.chunk(2, -1)
        of_gate = torch.ops.aten.silu_backward(grad * value, gate.contiguous())
        return torch.cat([of_gate, grad * _silu(gate)], -1)


def _silu(gate: Tensor) -> Tensor:
    # On a CPU the kernel for a part of a tensor is slower, and rounds otherwise than that for a whole one.
    return F.silu(gate if gate.is_cuda else gate.contiguous())


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden: int, *, mesh: Mesh = SINGLE):
        super().__init__()
        share(hidden, mesh, "the feed-forward hidden width")
        self.mesh = mesh
        self.w1 = ColumnParallelLinear(width, hidden, mesh=mesh, copy_input=False)
        self.w2 = ColumnParallelLinear(width, hidden, mesh=mesh, copy_input=False)
        self.w3 = RowParallelLinear(hidden, width, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.expand(x))

    def expand(self, x: Tensor, cut: TokenCut | None = None) -> Tensor:
        return joint_linear(enter(x, self.mesh, cut), self.w1, self.w2)

    def contract(self, hidden: Tensor, cut: TokenCut | None = None) -> Tensor:
        return self.w3(_Gate.apply(hidden), cut)


class MLP(nn.Module):
    """fc2(activation(fc1 x)), (..., width) -> (..., width)."""

    def __init__(
        self, width: int, hidden: int, *, activation: Callable[[Tensor], Tensor] = F.gelu, mesh: Mesh = SINGLE
    ):
        super().__init__()
        share(hidden, mesh, "the feed-forward hidden width")
        self.activation = activation
        self.fc1 = ColumnParallelLinear(width, hidden, mesh=mesh)
        self.fc2 = RowParallelLinear(hidden, width, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.expand(x))

    def expand(self, x: Tensor, cut: TokenCut | None = None) -> Tensor:
        return self.fc1(x, cut)

    def contract(self, hidden: Tensor, cut: TokenCut | None = None) -> Tensor:
        return self.fc2(self.activation(hidden), cut)


def feed_forward(kind: str, width: int, ratio: float, mesh: Mesh) -> MLP | SwiGLU:
    """The network ``kind`` ("mlp", "swiglu", "swiglu32", ...) of the config."""
    return (MLP if kind == "mlp" else SwiGLU)(width, ffn_hidden(kind, width, ratio), mesh=mesh)
