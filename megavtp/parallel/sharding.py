"""The cut of a parameter over tensor-parallel ranks, as data on the parameter itself.

The checkpoint, the gradient norm and the tests read it from there; no name pattern is matched anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MARK = "shard"  # attribute of a parameter


@dataclass(frozen=True)
class Shard:
    """A cut along ``dim``; a fused weight is ``parts`` equal blocks along it (q, k, v: 3), each cut on its own."""

    dim: int
    parts: int = 1


def mark(parameter: nn.Parameter, shard: Shard) -> None:
    setattr(parameter, _MARK, shard)


def shard_of(parameter: Tensor) -> Shard | None:
    """Return the cut of a parameter, ``None`` when every tensor-parallel rank holds all of it."""
    return getattr(parameter, _MARK, None)


def cut(full: Tensor, shard: Shard | None, rank: int, size: int) -> Tensor:
    """Return the piece of ``full`` that tensor-parallel rank ``rank`` of ``size`` holds."""
    if shard is None or size == 1:
        return full
    blocks = full.chunk(shard.parts, shard.dim)
    return torch.cat([block.chunk(size, shard.dim)[rank] for block in blocks], shard.dim)


def whole_shape(shape: Sequence[int], shard: Shard | None, size: int) -> tuple[int, ...]:
    """Return the shape of a tensor of which each of ``size`` tensor-parallel ranks holds a piece of ``shape``."""
    whole = list(shape)
    if shard is not None:
        whole[shard.dim] *= size
    return tuple(whole)


def merge(pieces: Sequence[Tensor], shard: Shard | None) -> Tensor:
    """Join all ranks' pieces, in rank order, to the whole: the inverse of ``cut``."""
    if shard is None or len(pieces) == 1:
        return pieces[0]
    blocks = [piece.chunk(shard.parts, shard.dim) for piece in pieces]
    return torch.cat([torch.cat(same_part, shard.dim) for same_part in zip(*blocks)], shard.dim)
