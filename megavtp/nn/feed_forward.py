"""There are two feed-forward networks: a gated one (SwiGLU, arXiv 2002.05202) and a plain MLP.

``expand`` computes the first matrix products, ``contract`` all that follows; for ``cut`` and ``redone`` see
``nn.block``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.sizes import ffn_hidden
from megavtp.nn.compiling import Region
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear, enter, joint_linear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sequence import TokenCut


def quick_gelu(x: Tensor) -> Tensor:
    """Compute x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class _Gate(torch.autograd.Function):
    """Computes silu(gate) * value. It saves only its inputs for the backward pass: autograd would also save
    silu(gate), half as much again, which is cheap to recompute."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return _silu(gate) * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * value, gate.contiguous()), grad * _silu(gate)


def gated(gate: Tensor, value: Tensor) -> Tensor:
    return _Gate.apply(gate, value)


def _silu(gate: Tensor) -> Tensor:
    # On a CPU, the kernel for a non-contiguous tensor is slower, and rounds differently.
    return F.silu(gate if gate.is_cuda else gate.contiguous())


class SwiGLU(nn.Module):
    """Maps x (..., width) to w3(silu(w1 x) * w2 x), (..., width)."""

    gated = Region(gated)

    def __init__(self, width: int, hidden: int, *, mesh: Mesh = SINGLE):
        super().__init__()
        mesh.tp_part(hidden, "the feed-forward hidden width")
        self.mesh = mesh
        self.w1 = ColumnParallelLinear(width, hidden, mesh=mesh, copy_input=False)
        self.w2 = ColumnParallelLinear(width, hidden, mesh=mesh, copy_input=False)
        self.w3 = RowParallelLinear(hidden, width, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.expand(x))

    def expand(self, x: Tensor, cut: TokenCut | None = None, redone: bool = False) -> tuple[Tensor, ...]:
        """Compute w1 x and w2 x."""
        x = enter(x, self.mesh, cut)
        return joint_linear(x, self.w1, self.w2).chunk(2, -1) if redone else (self.w1(x), self.w2(x))

    def contract(self, hidden: tuple[Tensor, ...], cut: TokenCut | None = None) -> Tensor:
        return self.w3(self.gated(*hidden), cut)


class MLP(nn.Module):
    """Maps x (..., width) to fc2(activation(fc1 x)), (..., width)."""

    def __init__(
        self, width: int, hidden: int, *, activation: Callable[[Tensor], Tensor] = F.gelu, mesh: Mesh = SINGLE
    ):
        super().__init__()
        mesh.tp_part(hidden, "the feed-forward hidden width")
        self.activation = activation
        self.fc1 = ColumnParallelLinear(width, hidden, mesh=mesh)
        self.fc2 = RowParallelLinear(hidden, width, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.expand(x))

    def expand(self, x: Tensor, cut: TokenCut | None = None, redone: bool = False) -> Tensor:
        return self.fc1(x, cut)

    def contract(self, hidden: Tensor, cut: TokenCut | None = None) -> Tensor:
        return self.fc2(self.activation(hidden), cut)


def feed_forward(kind: str, width: int, ratio: float, mesh: Mesh) -> MLP | SwiGLU:
    """Make the network ``kind`` ("mlp", "swiglu", "swiglu32", ...) of the config."""
    return (MLP if kind == "mlp" else SwiGLU)(width, ffn_hidden(kind, width, ratio), mesh=mesh)
