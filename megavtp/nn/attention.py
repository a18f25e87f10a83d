"""Multi-head self-attention over packed sequences; tensor-parallel ranks share the heads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megavtp.errors import UserError
from megavtp.nn.attention_kernels import Kernel, Segments, attend, check_kernel
from megavtp.nn.compiling import Region
from megavtp.nn.norms import rms_norm
from megavtp.nn.rope import RotaryTable, packed_table, rotate
from megavtp.parallel.collectives import copy_to_tp
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sequence import TokenCut


class HeadNorm(nn.Module):
    """The weight of an RMS norm over the head dimension of this rank's heads.

    Every rank holds the whole weight but sees only its heads, so the weight's gradient is summed over tp.
    """

    def __init__(self, head_dim: int, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(torch.empty(head_dim))

    def forward(self) -> Tensor:
        return copy_to_tp(self.weight, self.mesh)


Rotation = Callable[[Tensor, RotaryTable], Tensor]


def split_heads(
    qkv: Tensor, heads: int, eps: float, rotation: Rotation, q_weight: Tensor | None, k_weight: Tensor | None,
    *table: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (T, heads, h) of qkv (T, 3 * heads * h).

    Queries and keys are normalised if there are weights (h,), then rotated if there is a table, a row for each token.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(1)
    if q_weight is not None and k_weight is not None:
        # The norm's float32 weights may have raised 16 bits to 32, which the fast kernels do not take.
        q, k = rms_norm(q, q_weight, eps, v.dtype), rms_norm(k, k_weight, eps, v.dtype)
    if table:
        q, k = rotation(q, table), rotation(k, table)
    # Compiled, views of qkv would have their gradients added to it one by one, and would hold it for the backward.
    return (q.contiguous(), k.contiguous(), v.contiguous()) if torch.compiler.is_compiling() else (q, k, v)


class Attention(nn.Module):
    """Fused q, k, v projection, optional norm of q and k, rotary positions, attention, output projection.

    ``rotation`` applies a table to queries or keys: ``rope.rotate`` rotates channel k with k + h/2; other models pair
    other channels.
    """

    split_heads = Region(split_heads)

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool = False, norm_eps: float = 1e-5, causal: bool = False,
        rotation: Rotation = rotate, kernel: Kernel = "auto", mesh: Mesh = SINGLE,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not a multiple of heads {heads}; change one of them")
        check_kernel(kernel)
        self.mesh = mesh
        self.local_heads = mesh.tp_part(heads, "the number of attention heads")
        self.head_dim = width // heads
        self.causal, self.kernel, self.rotation = causal, kernel, rotation
        self.qkv = ColumnParallelLinear(width, 3 * width, mesh=mesh, parts=3)
        self.norm_eps = norm_eps
        self.q_norm = HeadNorm(self.head_dim, mesh) if qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, mesh) if qk_norm else None
        self.proj = RowParallelLinear(width, width, mesh=mesh)

    def forward(self, x: Tensor, segments: Segments, tables: Sequence[RotaryTable] | None = None) -> Tensor:
        """Attend in x (T, width), packed as ``segments`` says, with a rotary table per segment; return (T, width)."""
        table = None if tables is None else packed_table(tables, segments)
        return self.contract(self.expand(x), None, segments, table)

    def expand(self, x: Tensor, cut: TokenCut | None = None, redone: bool = False) -> Tensor:
        """Compute the first matrix product: q, k, v of this rank's heads, (T, 3 * width / tp)."""
        return self.qkv(x, cut)

    def contract(
        self, qkv: Tensor, cut: TokenCut | None, segments: Segments, table: RotaryTable | None = None
    ) -> Tensor:
        q_weight, k_weight = (None if norm is None else norm() for norm in (self.q_norm, self.k_norm))
        # Mere views are nothing to compile.
        split = split_heads if self.q_norm is None and table is None else self.split_heads
        q, k, v = split(qkv, self.local_heads, self.norm_eps, self.rotation, q_weight, k_weight, *(table or ()))
        return self.proj(attend(q, k, v, segments, self.causal, self.kernel).flatten(1), cut)
