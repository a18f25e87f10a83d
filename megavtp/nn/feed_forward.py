"""The two feed-forward networks: a gated one (SwiGLU, arXiv 2002.05202) and a plain MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.nn.split import share
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh

ALIGNMENT = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def hidden_width(kind: str, width: int, ratio: float) -> int:
    """Hidden width of ``kind``: SwiGLU takes 2/3 of the MLP's, rounded up to the multiple in its name."""
    hidden = int(width * ratio)
    if kind == "mlp":
        return hidden
    align = ALIGNMENT[kind]
    return -(-int(hidden * 2 / 3) // align) * align


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden: int, *, mesh: Mesh = SINGLE):
        super().__init__()
        share(hidden, mesh, "the feed-forward hidden width")
        self.w1 = ColumnParallelLinear(width, hidden, mesh=mesh)
        self.w2 = ColumnParallelLinear(width, hidden, mesh=mesh)
        self.w3 = RowParallelLinear(hidden, width, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


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
        return self.fc2(self.activation(self.fc1(x)))


def feed_forward(kind: str, width: int, ratio: float, mesh: Mesh) -> nn.Module:
    """The network ``kind`` ("mlp", "swiglu", "swiglu32", ...) of the config."""
    return (MLP if kind == "mlp" else SwiGLU)(width, hidden_width(kind, width, ratio), mesh=mesh)
