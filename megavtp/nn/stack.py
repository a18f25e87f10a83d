"""The loop over transformer blocks that all towers share, for a whole tower or for the part of it on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megavtp.nn.attention_kernels import Segments
from megavtp.nn.block import Block, Recompute
from megavtp.nn.drop_path import DropPlan
from megavtp.nn.rope import Table


def run_blocks(
    blocks: Iterable[tuple[int, Block]], x: Tensor, segments: Segments, tables: Sequence[Table] | None = None,
    drop: DropPlan | None = None, recompute: Recompute = "none", taken: dict[int, Tensor | None] | None = None,
) -> Tensor:
    """Packed tokens (T, width) through ``blocks`` -> (T, width).

    Args:
        blocks: (number in the whole tower, block) pairs in order; none at all give x back.
        segments, tables: how x is packed, and the rotary table of each segment.
        drop: of the whole tower.
        recompute: see ``Recompute``.
        taken: its keys name blocks; the output (T, width) of each that is among ``blocks`` becomes its value.
    """
    for index, block in blocks:
        choice = None if drop is None else drop.blocks[index]
        if recompute == "full" and torch.is_grad_enabled():
            # No random state to keep: the only randomness, the drop plan, is an argument.
            x = checkpoint(block, x, segments, tables, choice, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, segments, tables, choice)
        if taken is not None and index in taken:
            taken[index] = x
    return x
