"""LightningDiT positions its tokens by a fixed sine embedding, and by rotations of queries and keys.

Letters: N = side * side tokens in row-major order, D width, h head dimension. Sides are in tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megavtp.dit.config import CompleteDiT
from megavtp.nn.rope import RotaryTable

POSITIONS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")


def position_tables(config: CompleteDiT) -> dict[str, Tensor]:
    """Return the fixed positions of a DiT by the names of its buffers."""
    side = config.latent_size // config.patch_size
    tables = pair_tables(config.width // config.heads, side)
    return dict(zip(POSITIONS, (sine_positions(config.width, side)[None], *tables)))


def sine_positions(width: int, side: int) -> Tensor:
    """Return (N, D) float32: D/2 channels encode the column, then D/2 the row, each by D/4 sines then D/4 cosines."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (side, D/2)
    column, row = axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).flatten(0, 1).float()


def pair_tables(head_dim: int, side: int) -> RotaryTable:
    """Return cosines and sines (N, h) float32: the first h/2 channels rotate by the row, the last by the column.

    Neighbouring channels share an angle: they are the pairs of ``rotate_pairs``.
    """
    half = head_dim // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    axis = (torch.arange(side).float()[:, None] * frequencies).repeat_interleave(2, -1)  # (side, h/2)
    row, column = axis[:, None].expand(-1, side, -1), axis.expand(side, -1, -1)
    angles = torch.cat([row, column], -1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate queries or keys (b, L, heads, h), channel 2k with 2k + 1, in the table's dtype; return that of x."""
    cos, sin = (t.unsqueeze(1) for t in table)
    y = x.to(cos.dtype)
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    return (y * cos + torch.stack([-odd, even], -1).flatten(-2) * sin).to(x.dtype)
