"""Stochastic depth works on subsets of the batch (DINOv2's form of arXiv 1603.09382).

A residual branch runs on a random subset of the sequences only, and its output is scaled up by batch / kept.
The subset is chosen outside the modules, from (seed, step) alone, so that every parallel layout, every
micro-batch split and every recomputation sees the same choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from megavtp.nn.attention_kernels import Segments, spans
from megavtp.nn.seeded import named_generator
from megavtp.parallel.sequence import TokenCut


@dataclass(frozen=True)
class BranchDrop:
    """What one residual branch keeps of each segment: ``rows``, LongTensor (kept,), the positions of the sequences
    that go through it, and ``scales``, the factor on their result."""

    rows: tuple[Tensor, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class DropPlan:
    """What the attention branch and the feed-forward branch of each block keep."""

    blocks: tuple[tuple[BranchDrop, BranchDrop], ...]

    def to(self, device: torch.device | str) -> "DropPlan":
        """Move the plan to ``device`` in one transfer."""
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
    """Draw the plan of one forward pass as a pure function of the arguments.

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
    """Draw kept (size,) bool and a factor per branch (each block's attention, then feed-forward) and segment."""
    generator = named_generator(f"drop_path/{seed}/{step}/{tag}")

    def draw(size: int) -> tuple[Tensor, float]:
        keep = max(int(size * (1 - rate)), 1)
        kept = torch.zeros(size, dtype=torch.bool)
        kept[torch.randperm(size, generator=generator)[:keep]] = True
        return kept, size / keep

    return [[draw(size) for size in sizes] for _ in range(2 * depth)]


def scaled_sum(x: Tensor | None, y: Tensor, *factors: Tensor | None) -> Tensor:
    """Compute x + y * factors, where None stands for 0 or 1; the factors are float32 or of y's dtype."""
    for factor in factors:
        if factor is not None:
            y = y * factor
    return y if x is None else x + y


def add_branch(
    x: Tensor, branch: Callable[[Tensor, Segments, TokenCut | None], Tensor], segments: Segments,
    drop: BranchDrop | None, cut: TokenCut | None = None, gamma: Tensor | None = None,
    scaled_sum: Callable[..., Tensor] = scaled_sum,
) -> Tensor:
    """Compute x + gamma * branch(x), (T, width), with the branch on the sequences that ``drop`` keeps, scaled; None
    keeps all. ``gamma`` is a factor per channel, None = 1.

    The branch gets the kept tokens and their segments. With ``cut``, x has only this rank's rows (n, width), as does
    what the branch takes and returns; the cut that it is given then says which of the tokens are kept.
    """
    if drop is None:
        y = branch(x, segments, cut)
        return x + y if gamma is None else scaled_sum(x, y, gamma)
    tokens = torch.cat([  # positions of the kept sequences' tokens among all
        (kept[:, None] * length + torch.arange(place.start, place.start + length, device=x.device)).flatten()
        for (_, length), place, kept in zip(segments, spans(segments), drop.rows, strict=True)
    ])
    kept_segments = tuple((len(kept), length) for (_, length), kept in zip(segments, drop.rows))
    scales = torch.cat([
        torch.full((sequences * length, 1), scale, dtype=x.dtype, device=x.device)
        for (sequences, length), scale in zip(kept_segments, drop.scales, strict=True)
    ])
    if cut is None:
        y = branch(x.index_select(0, tokens), kept_segments, None)
        return x.index_add(0, tokens, scaled_sum(None, y, gamma, scales))
    y = branch(x, kept_segments, replace(cut, kept=tokens))
    scales = cut.own_rows(scales.new_zeros(cut.total, 1).index_copy_(0, tokens, scales))
    return scaled_sum(x, y, gamma, scales)  # what is dropped has scale 0
