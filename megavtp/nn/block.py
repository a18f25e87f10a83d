"""The pre-norm transformer block that all towers are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from megavtp.nn.attention import Attention
from megavtp.nn.attention_kernels import Segments
from megavtp.nn.drop_path import BranchDrop, add_branch
from megavtp.nn.rope import Table

# What the backward pass makes again instead of holding it: nothing, or all of a block but its input.
Recompute = Literal["none", "full"]


class LayerScale(nn.Module):
    """A learnt factor per channel (CaiT, arXiv 2103.17239), ``init`` at the start."""

    def __init__(self, width: int, init: float):
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x += ls1(attn(norm1 x)), then x += ls2(mlp(norm2 x)), on packed tokens (T, width)."""

    def __init__(
        self, width: int, attention: Attention, mlp: nn.Module, norm: Callable[[int], nn.Module],
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = norm(width)
        self.attn = attention
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = norm(width)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self, x: Tensor, segments: Segments, tables: Sequence[Table] | None = None,
        drop: tuple[BranchDrop, BranchDrop] | None = None,
    ) -> Tensor:
        drop_attention, drop_mlp = drop or (None, None)
        x = add_branch(x, lambda y, s: self.ls1(self.attn(self.norm1(y), s, tables)), segments, drop_attention)
        return add_branch(x, lambda y, _: self.ls2(self.mlp(self.norm2(y))), segments, drop_mlp)
