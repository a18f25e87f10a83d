"""The pre-norm transformer block that all towers are made of, and what of it the backward pass recomputes.

The values of ``parallel.recompute`` differ in what is held between forward and backward. In bytes per token and block,
for a width D and a SwiGLU hidden width H, under bfloat16 autocast with a float32 residual stream (of which two float32
tensors count):

none        32 D + 8 H   as counted on a CPU, where RMS norms hold 8 D of it that a fused kernel need not
selective   14 D + 4 H   the residual stream and the outputs of the first products (q, k, v; gate and value)
full         4 D         a block's input

Compiled regions (``nn.compiling``) hold less with "none". All blocks share a rotary table, 4 h for a head dimension h.

"selective" recomputes what is large but cheap: norms, casts, rotation, gating, and attention between its two products.
(Megatron-LM, arXiv 2205.05198, section 5, holds all but the softmax part. Today's kernels do not hold that, and with
the short sequences of a ViT, elementwise results are most of what a block holds.) No product with a weight is
recomputed, so it costs L / (6 D) of a forward for sequences of length L; "full" costs a whole forward.
With sequence parallelism a rank holds only its rows of the residual stream, so that all terms are divided by tp.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megavtp.nn.attention import Attention
from megavtp.nn.attention_kernels import Segments
from megavtp.nn.compiling import Region
from megavtp.nn.drop_path import BranchDrop, DropPlan, add_branch, scaled_sum
from megavtp.nn.rope import RotaryTable, packed_table
from megavtp.parallel.layers import compute_dtype_of
from megavtp.parallel.sequence import TokenCut, on_own_rows

Recompute = Literal["none", "selective", "full"]


class LayerScale(nn.Module):
    """A learnt factor per channel (CaiT, arXiv 2103.17239), which starts at ``init``."""

    def __init__(self, width: int, init: float):
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, cut: TokenCut | None = None) -> Tensor:
        return on_own_rows(self.gamma, cut)


class TwoHalves(Protocol):
    """A network that is called in two halves: what its input is multiplied by first, and all that follows.

    ``redone`` tells the first half that the backward pass repeats it up to its last product.
    """

    def expand(self, x: Tensor, cut: TokenCut | None, redone: bool = False) -> Any: ...

    def contract(self, *args: Any, **kwargs: Any) -> Tensor: ...


class Block(nn.Module):
    """Computes x += ls1 * attn(norm1 x), then x += ls2 * mlp(norm2 x), on packed tokens (T, width)."""

    scaled_sum = Region(scaled_sum)

    def __init__(
        self, width: int, attention: Attention, mlp: TwoHalves, norm: Callable[[int], nn.Module],
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.mesh = attention.mesh
        self.norm1 = norm(width)
        self.attn = attention
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = norm(width)
        self.mlp = mlp
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self, x: Tensor, segments: Segments, table_of: Callable[[Segments], RotaryTable | None] = lambda segments: None,
        drop: tuple[BranchDrop, BranchDrop] | None = None, cut: TokenCut | None = None, recompute: Recompute = "none",
    ) -> Tensor:
        """Apply the block to packed tokens, (n, width) -> (n, width); with ``cut``, to this rank's rows of them.

        ``table_of`` gives the rotary table of packed tokens, if there is one. The caller does "full" recomputation,
        with ``run_block``.
        """
        drop_attention, drop_mlp = drop or (None, None)

        def attention(y: Tensor, kept: Segments, cut: TokenCut | None) -> Tensor:
            return branch(y, self.norm1, self.attn, cut, recompute, kept, table_of(kept))

        def mlp(y: Tensor, _: Segments, cut: TokenCut | None) -> Tensor:
            return branch(y, self.norm2, self.mlp, cut, recompute)

        gammas = [None if scale is None else scale(cut) for scale in (self.ls1, self.ls2)]
        x = add_branch(x, attention, segments, drop_attention, cut, gammas[0], self.scaled_sum)
        return add_branch(x, mlp, segments, drop_mlp, cut, gammas[1], self.scaled_sum)


def branch(
    x: Tensor, norm: Callable[[Tensor, TokenCut | None, torch.dtype], Tensor], net: TwoHalves, cut: TokenCut | None,
    recompute: Recompute, *more: Any,
) -> Tensor:
    """Compute net(norm x) with the given recomputation; ``norm`` casts, and ``more`` goes to the net's second half."""
    dtype = compute_dtype_of(x)
    if recompute == "selective":
        hidden = redo(lambda y: net.expand(norm(y, cut, dtype), cut, redone=True), x)
        return redo(net.contract, hidden, cut, *more)
    y = norm(x, cut, dtype)
    # Of the gathered tokens only own rows are held; the backward gathers again (arXiv 2205.05198, section 4.2.2).
    held = cut is None or recompute == "full"
    hidden = net.expand(y, cut) if held else redo(lambda y: net.expand(y, cut, redone=True), y)
    return net.contract(hidden, cut, *more)


def run_block(block: nn.Module, recompute: Recompute, *arguments: Any) -> Tensor:
    """Run ``block(*arguments, recompute)``; with "full", only the arguments are held for the backward pass."""
    return redo(block, *arguments, recompute) if recompute == "full" else block(*arguments, recompute)


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
        recompute: what the backward pass recomputes.
        taken: its keys name blocks; the output (T, width) of each that is among ``blocks`` becomes its value.
    """
    chosen = [(index, cast(Block, block)) for index, block in blocks]
    cut = TokenCut(chosen[0][1].mesh, len(x)) if chosen and chosen[0][1].mesh.sequence_parallel else None
    x = x if cut is None else cut.split(x)
    # With stochastic depth each block has other sequences, and holds its own.
    table_of = lru_cache(1)(lambda segments: None if tables is None else packed_table(tables, segments))
    for index, block in chosen:
        choice = None if drop is None else drop.blocks[index]
        x = run_block(block, recompute, x, segments, table_of, choice, cut)
        if taken is not None and index in taken:
            taken[index] = x if cut is None else cut.join(x)
    return x if cut is None else cut.join(x)


def redo(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``function(*arguments)``, and recompute it in the backward pass up to its last saved tensor.

    A product at the end of ``function`` is thus not recomputed, only what leads to it.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    # There is no random state to keep: the only randomness, the drop plan, is an argument.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
