"""All towers share this loop over transformer blocks, for a whole tower or for the part of it on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from megavtp.nn.attention_kernels import Segments
from megavtp.nn.block import Block, Recompute, run_block
from megavtp.nn.drop_path import DropPlan
from megavtp.nn.rope import RotaryTable
from megavtp.parallel.sequence import TokenCut


def run_blocks(
    blocks: Iterable[tuple[int, nn.Module]], x: Tensor, segments: Segments, tables: Sequence[RotaryTable] | None = None,
    drop: DropPlan | None = None, recompute: Recompute = "none", taken: dict[int, Tensor | None] | None = None,
) -> Tensor:
    """Run packed tokens (T, width) through ``blocks`` and return (T, width).

    Under sequence parallelism the tensor-parallel ranks share the tokens inside this function; input and output are
    whole, and the same on each rank.

    Args:
        blocks: pairs (number in the whole tower, block) in order; without any, x is returned.
        segments, tables: segments says how x is packed; tables has a rotary table per segment.
        drop: the plan of the whole tower.
        recompute: what the backward pass recomputes, see ``nn.block``.
        taken: its keys name blocks; the output (T, width) of each that is among ``blocks`` becomes its value.
    """
    chosen = [(index, cast(Block, block)) for index, block in blocks]
    cut = TokenCut(chosen[0][1].mesh, len(x)) if chosen and chosen[0][1].mesh.sequence_parallel else None
    x = x if cut is None else cut.split(x)
    for index, block in chosen:
        choice = None if drop is None else drop.blocks[index]
        x = run_block(block, recompute, x, segments, tables, choice, cut)
        if taken is not None and index in taken:
            taken[index] = x if cut is None else cut.join(x)
    return x if cut is None else cut.join(x)
