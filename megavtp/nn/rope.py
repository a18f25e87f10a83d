"""Rotary position embedding on the two axes of a patch grid (RoFormer, arXiv 2104.09864; DINOv3 for the axes).

Letters: L tokens, N = rows * columns patches, h head dimension.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megavtp.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RotaryTable = tuple[Tensor, ...]  # what a rotation reads, L rows; that of ``rotate``: cosine and sine, each (L, h)


def rope_periods(head_dim: int, dtype: torch.dtype, base: float = 100.0) -> Tensor:
    """Compute base^(2j / (h/2)) for j < h/4 as (h/4,), with every operation rounded to ``dtype``."""
    exponents = 2 * torch.arange(head_dim // 4, dtype=dtype, device="cpu") / (head_dim // 2)
    return base**exponents


class AxialRope(nn.Module):
    """This makes the tables of a patch grid, which all heads and blocks share.

    ``dtype`` "bfloat16" rounds every step as the released VTP models do (float32 shifts their outputs by about
    1e-2). ``periods`` is a buffer because official checkpoints store it; it keeps its dtype when the model is cast.
    """

    periods: Tensor
    CACHED_GRIDS = 16  # a run has a handful of crop sizes; evaluation on any sizes must not grow without bound

    def __init__(self, head_dim: int, dtype: str = "bfloat16"):
        super().__init__()
        if head_dim % 4:
            raise UserError(f"axial RoPE needs a head dimension that 4 divides, not {head_dim}; change width or heads")
        self.head_dim, self.dtype = head_dim, DTYPES[dtype]
        self.register_buffer("periods", torch.empty(head_dim // 4, dtype=self.dtype))
        self._cache: OrderedDict[tuple[int, ...], RotaryTable] = OrderedDict()
        self.reset_periods()

    def reset_periods(self) -> None:
        """Fill the buffer; needed again after a build on the meta device."""
        if not self.periods.is_meta:
            with torch.no_grad():
                self.periods.copy_(rope_periods(self.head_dim, self.dtype))
        self._cache.clear()

    def _apply(self, fn, recurse: bool = True):
        before = self.periods
        super()._apply(fn, recurse)
        if self.periods.dtype != before.dtype:  # after .to(dtype), .half(), ...: only the device may change
            self.periods = before.to(self.periods.device)
        self._cache.clear()
        return self

    def tables(self, rows: int, columns: int, prefix: int = 0) -> RotaryTable:
        """Return cosines and sines (prefix + rows * columns, h); the first ``prefix`` tokens are not rotated."""
        key = (rows, columns, prefix, self.periods.data_ptr(), self.periods._version)
        if key not in self._cache:
            # Tables made in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = self._build(rows, columns, prefix)
            if len(self._cache) > self.CACHED_GRIDS:
                self._cache.popitem(last=False)
        return self._cache[key]

    def _build(self, rows: int, columns: int, prefix: int) -> RotaryTable:
        device, dtype = self.periods.device, self.dtype
        y = torch.arange(0.5, rows, device=device, dtype=dtype) / rows
        x = torch.arange(0.5, columns, device=device, dtype=dtype) / columns
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # (N, 2), row coordinate first
        centres = 2.0 * centres - 1.0
        angles = 2 * math.pi * centres[:, :, None] / self.periods[None, None, :]
        angles = angles.flatten(1).tile(2)  # (N, h): channel k and k + h/2 share an angle
        cos, sin = torch.cos(angles), torch.sin(angles)
        ones, zeros = cos.new_ones(prefix, self.head_dim), sin.new_zeros(prefix, self.head_dim)
        return torch.cat([ones, cos]), torch.cat([zeros, sin])


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate queries or keys (..., L, heads, h) by a table (L, h) in the table's dtype; the result has that of x."""
    cos, sin = (t.unsqueeze(1) for t in table)
    y = x.to(cos.dtype)
    first, second = y.chunk(2, -1)
    return (y * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def packed_table(tables: Sequence[RotaryTable], segments: Sequence[tuple[int, int]]) -> RotaryTable:
    """Give every token of a packed batch its row, T in all; ``tables`` has a table per segment."""
    return tuple(
        torch.cat([part.expand(sequences, *part.shape).flatten(0, 1) for part, (sequences, _) in zip(parts, segments)])
        for parts in zip(*tables)
    )


def reset_rope(model: nn.Module) -> None:
    """Fill the periods of every rotary embedding in a model whose memory is new."""
    for module in model.modules():
        if isinstance(module, AxialRope):
            module.reset_periods()
