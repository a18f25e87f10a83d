"""Stochastic depth on subsets of the batch (DINOv2's form of arXiv 1603.09382).

A residual branch runs on a random subset of the sequences only, and its output is scaled up by batch / kept.
Which sequences is decided outside the modules, from (seed, step) alone, so that every parallel layout, every
micro-batch split and every recomputation sees the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megavtp.nn.attention_kernels import Segments
from megavtp.nn.seeded import named_generator


@dataclass(frozen=True)
class BranchDrop:
    """Of one residual branch: per segment the kept sequences' positions, LongTensor (kept,), and the factor."""

    rows: tuple[Tensor, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class DropPlan:
    """Per block the choice of its attention branch and of its feed-forward branch."""

    blocks: tuple[tuple[BranchDrop, BranchDrop], ...]

    def to(self, device: torch.device | str) -> DropPlan:
        """The plan on ``device``, moved in one transfer."""
        branches = [branch for block in self.blocks for branch in block]
        rows = [row for branch in branches for row in branch.rows]
        packed = torch.cat(rows)
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        moved = iter(packed.to(device, non_blocking=True).split([len(row) for row in rows]))
        branches = [BranchDrop(tuple(next(moved) for _ in branch.rows), branch.scales) for branch in branches]
        return DropPlan(tuple(zip(branches[::2], branches[1::2])))


def draw_drop_plan(
    *, seed: int, step: int, tag: str, depth: int, rate: float, global_sizes: Sequence[int],
    local_rows: Sequence[Tensor],
) -> DropPlan | None:
    """Draw the plan of one forward pass; a pure function of its arguments.

    ``tag`` names the pass. ``global_sizes``: sequences per segment in the *global* batch; ``local_rows``: per segment
    the global indices (CPU LongTensor) that this call holds, in order. Per block, branch and segment,
    max(int(size * (1 - rate)), 1) sequences of the global batch are kept. None when ``rate`` is 0.
    """
    if rate == 0:
        return None
    branches = []
    for choice in _global_choice(seed, step, tag, depth, rate, tuple(global_sizes)):
        rows = [kept[local].nonzero().squeeze(1) for (kept, _), local in zip(choice, local_rows, strict=True)]
        branches.append(BranchDrop(tuple(rows), tuple(scale for _, scale in choice)))
    return DropPlan(tuple(zip(branches[::2], branches[1::2])))


@lru_cache(maxsize=2)  # the micro-batches of a step share the draw
def _global_choice(
    seed: int, step: int, tag: str, depth: int, rate: float, sizes: tuple[int, ...]
) -> list[list[tuple[Tensor, float]]]:
    """Per branch (attention and feed-forward in turn, block by block) and segment: kept (size,) bool, and factor."""
    generator = named_generator(f"drop_path/{seed}/{step}/{tag}")

    def draw(size: int) -> tuple[Tensor, float]:
        keep = max(int(size * (1 - rate)), 1)
        kept = torch.zeros(size, dtype=torch.bool)
        kept[torch.randperm(size, generator=generator)[:keep]] = True
        return kept, size / keep

    return [[draw(size) for size in sizes] for _ in range(2 * depth)]


def add_branch(
    x: Tensor, branch: Callable[[Tensor, Segments], Tensor], segments: Segments, drop: BranchDrop | None
) -> Tensor:
    """x + branch(x), (T, width), on the sequences that ``drop`` keeps, scaled; on all of them without ``drop``."""
    if drop is None:
        return x + branch(x, segments)
    rows, scales, start = [], [], 0
    for (sequences, length), kept, scale in zip(segments, drop.rows, drop.scales, strict=True):
        rows.append((kept[:, None] * length + torch.arange(start, start + length, device=x.device)).flatten())
        scales.append(torch.full((len(rows[-1]), 1), scale, dtype=x.dtype, device=x.device))
        start += sequences * length
    tokens = torch.cat(rows)
    kept_segments = tuple((len(kept), length) for (_, length), kept in zip(segments, drop.rows))
    y = branch(x.index_select(0, tokens), kept_segments)
    return x.index_add(0, tokens, y.to(x.dtype) * torch.cat(scales))
