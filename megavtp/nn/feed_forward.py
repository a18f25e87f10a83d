"""There are two feed-forward networks: a gated one (SwiGLU, arXiv 2002.05202) and a plain MLP.

``expand`` computes the first matrix product, ``contract`` all that follows; for ``cut`` see ``nn.block``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.sizes import ffn_hidden
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear, enter, joint_linear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sequence import TokenCut


def quick_gelu(x: Tensor) -> Tensor:
    """Compute x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class _Gate(torch.autograd.Function):
    """Computes silu(g) * v of the halves g, v of the last dimension. It saves only its input for the backward pass:
    autograd would also save silu(g), half as much again, which is cheap to recompute."""

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
    # On a CPU, the kernel for a non-contiguous tensor is slower, and rounds differently.
    return F.silu(gate if gate.is_cuda else gate.contiguous())


class SwiGLU(nn.Module):
    """Maps x (..., width) to w3(silu(w1 x) * w2 x), (..., width)."""

    def __init__(self, width: int, hidden: int, *, mesh: Mesh = SINGLE):
        super().__init__()
        mesh.tp_part(hidden, "the feed-forward hidden width")
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

    def expand(self, x: Tensor, cut: TokenCut | None = None) -> Tensor:
        return self.fc1(x, cut)

    def contract(self, hidden: Tensor, cut: TokenCut | None = None) -> Tensor:
        return self.fc2(self.activation(hidden), cut)


def feed_forward(kind: str, width: int, ratio: float, mesh: Mesh) -> MLP | SwiGLU:
    """Make the network ``kind`` ("mlp", "swiglu", "swiglu32", ...) of the config."""
    return (MLP if kind == "mlp" else SwiGLU)(width, ffn_hidden(kind, width, ratio), mesh=mesh)
