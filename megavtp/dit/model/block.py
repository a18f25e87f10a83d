"""LightningDiT's transformer block has adaptive norms (DiT, arXiv 2212.09748), rotary attention and SwiGLU.

Letters: b samples, N tokens, D width. ``condition`` (b, D) is SiLU of the sum of the embeddings, after one
``copy_to_tp`` for all blocks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.dit.config import swiglu_hidden
from megavtp.dit.model.positions import rotate_pairs
from megavtp.nn.attention import Attention
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute, branch
from megavtp.nn.compiling import Region
from megavtp.nn.norms import rms_norm
from megavtp.nn.rope import RotaryTable
from megavtp.parallel.collectives import gather_from_tp
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.sequence import TokenCut, on_own_rows

NORM_EPS = 1e-6


def gated(hidden: Tensor) -> Tensor:
    """Compute silu(a) * b, where a and b lie side by side."""
    a, b = hidden.chunk(2, -1)
    return F.silu(a) * b


class FusedSwiGLU(nn.Module):
    """Maps x (..., D) to w3(silu(a) * b), (..., D), with (a, b) = w12 x."""

    gated = Region(gated)

    def __init__(self, width: int, mesh: Mesh):
        super().__init__()
        hidden = swiglu_hidden(width)
        mesh.tp_part(hidden, "the feed-forward hidden width")
        self.w12 = ColumnParallelLinear(width, 2 * hidden, mesh=mesh, parts=2)
        self.w3 = RowParallelLinear(hidden, width, mesh=mesh)

    def expand(self, x: Tensor, cut: TokenCut | None = None, redone: bool = False) -> Tensor:
        """Compute the first matrix product, a and b side by side."""
        return self.w12(x, cut)

    def contract(self, hidden: Tensor, cut: TokenCut | None = None) -> Tensor:
        return self.w3(self.gated(hidden), cut)


class Modulation(nn.Module):
    """The linear layer of adaptive norms, from a condition (b, D) to ``parts`` tensors (b, 1, D).

    These layers hold a third of a DiT's weights, which tp ranks share; the outputs, a row per sample, are gathered.
    """

    def __init__(self, width: int, parts: int, mesh: Mesh):
        super().__init__()
        mesh.tp_part(width, "the width of the DiT")
        self.mesh, self.parts = mesh, parts
        # The name is the linear's place in LightningDiT's pair of SiLU and linear.
        self.add_module("1", ColumnParallelLinear(width, parts * width, mesh=mesh, parts=parts, copy_input=False))

    def forward(self, condition: Tensor, cut: TokenCut | None = None) -> tuple[Tensor, ...]:
        """Return the tensors; ``cut`` is given under sequence parallelism, where each rank modulates its own tokens."""
        own = self.get_submodule("1")(condition).unflatten(-1, (self.parts, 1, -1))
        return on_own_rows(gather_from_tp(own, self.mesh), cut).unbind(1)


def modulated_norm(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise x (b, N, D), modulate it by shift and scale (b, 1, D), and cast it to ``dtype``."""
    y = rms_norm(x, weight, NORM_EPS) * (1 + scale) + shift
    return y.to(dtype or y.dtype)


class ModulatedNorm(nn.Module):
    modulated_norm = Region(modulated_norm)

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(
        self, x: Tensor, shift: Tensor, scale: Tensor, cut: TokenCut | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.modulated_norm(x, on_own_rows(self.weight, cut), shift, scale, dtype)


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute x + gate * y of x and y (b, N, D), gate (b, 1, D)."""
    return x + gate * y


class DiTBlock(nn.Module):
    """Computes x += gate * attn(norm1 x) on x (b, N, D), then the same with the feed-forward network."""

    gated_sum = Region(gated_sum)

    def __init__(self, width: int, heads: int, *, qk_norm: bool, kernel: Kernel, mesh: Mesh):
        super().__init__()
        self.norm1 = ModulatedNorm(width)
        self.attn = Attention(
            width, heads, qk_norm=qk_norm, norm_eps=NORM_EPS, rotation=rotate_pairs, kernel=kernel, mesh=mesh
        )
        self.norm2 = ModulatedNorm(width)
        self.mlp = FusedSwiGLU(width, mesh)
        self.adaLN_modulation = Modulation(width, 6, mesh)

    def forward(
        self, x: Tensor, condition: Tensor, table: RotaryTable, cut: TokenCut | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Apply the block. ``table`` has a row for each of the b * N tokens. With ``cut`` (sequence parallelism), x and
        the result have this rank's n of the N tokens. For ``recompute`` see ``nn.block``; the caller does "full"."""
        samples = len(x)
        segments = ((samples, len(table[0]) // samples),)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition, cut)

        def modulated(norm: ModulatedNorm, shift: Tensor, scale: Tensor) -> Callable[..., Tensor]:
            return lambda y, cut, dtype: norm(y, shift, scale, cut, dtype).flatten(0, 1)

        y = branch(x, modulated(self.norm1, shift_a, scale_a), self.attn, cut, recompute, segments, table)
        x = self.gated_sum(x, gate_a, y.unflatten(0, (samples, -1)))
        y = branch(x, modulated(self.norm2, shift_m, scale_m), self.mlp, cut, recompute)
        return self.gated_sum(x, gate_m, y.unflatten(0, (samples, -1)))


class FinalLayer(nn.Module):
    """Maps tokens (b, N, D) to the velocity of each token's latent patch (b, N, outputs)."""

    def __init__(self, width: int, outputs: int, mesh: Mesh):
        super().__init__()
        self.norm_final = ModulatedNorm(width)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = Modulation(width, 2, mesh)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)
        return self.linear(self.norm_final(x, shift=shift, scale=scale))
