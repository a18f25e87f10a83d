"""LightningDiT positions its tokens by a fixed sine embedding, and by rotations of queries and keys.

Letters: N = side * side tokens in row-major order, D width, h head dimension. Sides are in tokens.
"""

import torch
from torch import Tensor

from megavtp.dit.config import CompleteDiT
from megavtp.nn.rope import RotaryTable

POSITIONS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")


def position_tables(config: CompleteDiT) -> dict[str, Tensor]:
    """Return the fixed positions of a DiT, float32, by the names of its buffers.

    In ``pos_embed`` (1, N, D), D/2 channels encode the column, then D/2 the row, each by D/4 sines then D/4 cosines. By
    ``freqs_cos`` and ``freqs_sin`` (N, h), the first h/2 channels rotate by the row, the last by the column;
    neighbouring channels share an angle: they are the pairs of ``pair_table``.
    """
    side, quarter, half = config.latent_size // config.patch_size, config.width // 4, config.width // config.heads // 2
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    row, column = _on_grid(torch.cat([angles.sin(), angles.cos()], 1))
    sines = torch.cat([column, row], -1).float()
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    angles = torch.cat(_on_grid((torch.arange(side).float()[:, None] * frequencies).repeat_interleave(2, -1)), -1)
    return dict(zip(POSITIONS, (sines[None], angles.cos(), angles.sin())))


def _on_grid(axis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (side, c) of each token's row and of its column, (N, c) each."""
    side = len(axis)
    return axis.repeat_interleave(side, 0), axis.repeat(side, 1)


def pair_table(cos: Tensor, sin: Tensor) -> RotaryTable:
    """Return the table of ``rotate_pairs``, a cosine and a sine for each pair of channels, (L, h/2, 2)."""
    return (torch.stack([cos[:, ::2], sin[:, ::2]], -1),)


def rotate_pairs(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate queries or keys (..., L, heads, h), channel 2k with 2k + 1, in the table's dtype; return that of x."""
    turns = table[0].unsqueeze(1)
    pairs = x.to(turns.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes no loops over complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return rotated.flatten(-2).to(x.dtype)
