"""Striped towers: each tower is cut into consecutive chunks, chunk c on pipeline rank c mod p.

With p ranks and v virtual stages a rank, every tower (encoder, text, decoder, teacher) has p * v chunks, so each rank
holds a share of all of them and none idles while another tower runs. A pass goes through one tower after another
(its *legs*): stage s is chunk s mod (p v) of leg s // (p v), and lies on rank s mod p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

ActivationSpec = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor that goes from stage to stage


def cut_tower(costs: Sequence[float], chunks: int, *, first: float = 0.0, last: float = 0.0) -> tuple[range, ...]:
    """Cut a tower's blocks into ``chunks`` consecutive ranges of the least possible highest cost.

    Args:
        costs: relative cost of each block.
        first, last: what the first chunk carries on top (an embedding), and the last one (norm, head).

    Among cuts of the same highest cost the evenest (least sum of squares) is taken. Where there are as many blocks as
    chunks or more, no chunk is empty; of a shorter tower some are.
    """
    return _cut(tuple(costs), chunks, first, last)


@lru_cache(maxsize=64)
def _cut(costs: tuple[float, ...], chunks: int, first: float, last: float) -> tuple[range, ...]:
    depth, sums = len(costs), [0.0, *accumulate(costs)]
    least = 1 if depth >= chunks else 0

    def cost(chunk: int, start: int, end: int) -> float:
        ends = (first if chunk == 0 else 0.0) + (last if chunk == chunks - 1 else 0.0)
        return sums[end] - sums[start] + ends

    def best(limit: float | None) -> tuple[float, tuple[int, ...]]:
        """The least highest cost, or with ``limit`` the least sum of squares of chunks up to it; and where to cut."""
        found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
        for chunk in range(chunks):
            longer: dict[int, tuple[float, tuple[int, ...]]] = {}
            for end in range(depth + 1):
                for start, (value, cuts) in found.items():
                    if start + least > end:
                        continue
                    own = cost(chunk, start, end)
                    if limit is not None and own > limit:
                        continue
                    total = max(value, own) if limit is None else value + own * own
                    if end not in longer or total < longer[end][0] - 1e-12 * abs(total):
                        longer[end] = (total, (*cuts, end))
            found = longer
        return found[depth]

    highest, _ = best(None)
    _, cuts = best(highest * (1 + 1e-9))
    return tuple(range(start, end) for start, end in pairwise(cuts))


@dataclass(frozen=True)
class Part:
    """What one call of a tower runs: some of its blocks, with its embedding (``first``) and its end (``last``)."""

    blocks: range
    first: bool
    last: bool


@dataclass(frozen=True)
class Stripe:
    """How one tower is cut, and what of it one pipeline rank holds."""

    chunks: tuple[range, ...]  # block numbers of each chunk; ``pp`` divides the number of chunks
    pp: int = 1
    rank: int = 0

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks on this rank."""
        return [block for chunk in self.chunks[self.rank :: self.pp] for block in chunk]

    @property
    def depth(self) -> int:
        return self.chunks[-1].stop

    @property
    def first(self) -> bool:
        """Whether the first chunk, with the embedding, is on this rank."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether the last chunk, with the norm and the heads, is on this rank."""
        return self.rank == self.pp - 1

    def part(self, chunk: int | None) -> Part:
        """Chunk ``chunk``, or with None the whole tower (where one rank holds it)."""
        if chunk is None:
            return Part(range(self.depth), True, True)
        return Part(self.chunks[chunk], chunk == 0, chunk == len(self.chunks) - 1)


def whole(depth: int) -> Stripe:
    """The stripe of a tower that is not cut."""
    return Stripe((range(depth),))
