"""Multi-head self-attention over packed sequences; tensor-parallel ranks share the heads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megavtp.errors import UserError
from megavtp.nn.attention_kernels import Kernel, Segments, attend, check_kernel, spans
from megavtp.nn.norms import RMSNorm, rms_norm
from megavtp.nn.rope import RotaryTable, rotate
from megavtp.parallel.collectives import copy_to_tp
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sequence import TokenCut


class HeadNorm(RMSNorm):
    """An RMS norm over the head dimension of this rank's heads.

    Every rank holds the whole weight but sees only its heads, so the weight's gradient is summed over tp.
    """

    def __init__(self, head_dim: int, mesh: Mesh, eps: float = 1e-5):
        super().__init__(head_dim, eps)
        self.mesh = mesh

    def forward(self, x: Tensor, cut: TokenCut | None = None) -> Tensor:
        return rms_norm(x, copy_to_tp(self.weight, self.mesh), self.eps)


class Attention(nn.Module):
    """Fused q, k, v projection, optional norm of q and k, rotary positions, attention, output projection.

    ``rotation`` applies a table to queries or keys: ``rope.rotate`` rotates channel k with k + h/2; other models pair
    other channels.
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool = False, norm_eps: float = 1e-5, causal: bool = False,
        rotation: Callable[[Tensor, RotaryTable], Tensor] = rotate, kernel: Kernel = "auto", mesh: Mesh = SINGLE,
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
        self.q_norm = HeadNorm(self.head_dim, mesh, norm_eps) if qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, mesh, norm_eps) if qk_norm else None
        self.proj = RowParallelLinear(width, width, mesh=mesh)

    def forward(self, x: Tensor, segments: Segments, tables: Sequence[RotaryTable] | None = None) -> Tensor:
        """Attend in x (T, width), packed as ``segments`` says, with a rotary table per segment; return (T, width)."""
        return self.contract(self.expand(x), None, segments, tables)

    def expand(self, x: Tensor, cut: TokenCut | None = None, redone: bool = False) -> Tensor:
        """Compute the first matrix product: q, k, v of this rank's heads, (T, 3 * width / tp)."""
        return self.qkv(x, cut)

    def contract(
        self, qkv: Tensor, cut: TokenCut | None, segments: Segments, tables: Sequence[RotaryTable] | None = None
    ) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.local_heads, self.head_dim)).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            # The norm's float32 weights may have raised 16 bits to 32, which the fast kernels do not take.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if tables is not None:
            q, k = self._rotated(q, segments, tables), self._rotated(k, segments, tables)
        return self.proj(attend(q, k, v, segments, self.causal, self.kernel).flatten(1), cut)

    def _rotated(self, x: Tensor, segments: Segments, tables: Sequence[RotaryTable]) -> Tensor:
        pieces = [
            self.rotation(x[place].unflatten(0, segment), table).flatten(0, 1)
            for segment, place, table in zip(segments, spans(segments), tables)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
