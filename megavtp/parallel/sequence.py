"""Sequence parallelism (Megatron-LM, arXiv 2205.05198): tensor-parallel ranks also share the tokens.

Norms, layer scales, stochastic depth and residual sums work on one token at a time. Plain tensor parallelism does them
on all tokens on every rank; here each rank does them on its own rows of the packed tokens, and holds only these for
the backward pass. A column-parallel layer gathers the rows, a row-parallel one sums and scatters them: together they
send what the two all-reduces would.

Letters: T packed tokens, n rows of a rank, k tokens that a branch keeps, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.parallel.collectives import all_gather, copy_to_tp, reduce_scatter
from megavtp.parallel.mesh import Mesh


@dataclass(frozen=True)
class TokenCut:
    """The distribution of packed tokens (T, D) over the tp ranks.

    They are cut as one row of tokens, n = ceil(T / tp), of which rank r has those from r * n on. Where the work on a
    token depends on its sample, each of ``sequences`` equal sequences is cut in this way instead: a rank has its part
    of the first, then of the second, and so on. Rows past the end are padding: nothing is read from them or reaches
    them, and they send back no gradient.

    Attributes:
        total: T.
        kept: positions (k,) among the T tokens that a residual branch works on, for ``gather`` and ``reduce``; None =
            all. The rows of a rank hold kept and other tokens alike, in whatever proportion chance gives it, so all
            rows are sent: with shares this uneven, cutting the kept ones anew would need a further exchange.
        sequences: into how many equal parts, each cut on its own, the tokens fall; with ``kept``, 1.
    """

    mesh: Mesh
    total: int
    kept: Tensor | None = None
    sequences: int = 1

    @property
    def length(self) -> int:
        """The number of tokens that are cut together."""
        return self.total // self.sequences

    @property
    def share_of_each(self) -> int:
        """The number of rows that this rank has of each sequence; n is ``sequences`` times that."""
        return ceil_div(self.length, self.mesh.tp)

    def keeping(self, kept: Tensor) -> TokenCut:
        return replace(self, kept=kept)

    def split(self, x: Tensor) -> Tensor:
        """(T, ...), the same on every rank -> own rows (n, ...); the gradient is gathered."""
        return _Split.apply(x, self)

    def join(self, x: Tensor) -> Tensor:
        """Own rows (n, D) -> all tokens (T, D). What follows must be the same on every rank, as each keeps its own rows
        of the gradient."""
        return _Join.apply(x, self)

    def gather(self, x: Tensor) -> Tensor:
        """Own rows (n, D) -> the kept tokens of all ranks (k, D); the gradient is summed over ranks and scattered."""
        return _Gather.apply(x, self)

    def reduce(self, x: Tensor) -> Tensor:
        """Each rank's summand for the kept tokens (k, D) -> own rows of the sum (n, D), 0 where a token is not kept;
        the gradient is gathered."""
        return _Reduce.apply(x, self)

    def share(self, parameter: Tensor) -> Tensor:
        """Use on own rows a parameter that all ranks hold: its gradient is summed over ranks in the graph, so that no
        ZeRO stage has to know about it."""
        return copy_to_tp(parameter, self.mesh)

    def own_rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of (T, ...), padded with zeros; no gradient flows."""
        each = x.detach().unflatten(0, (self.sequences, self.length))
        own = each[:, self.mesh.tp_rank * self.share_of_each :][:, : self.share_of_each]
        if own.shape[1] == self.share_of_each:
            # A view would keep the tokens of the other ranks alive.
            return own.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        padded = own.new_zeros(self.sequences, self.share_of_each, *x.shape[1:])
        padded[:, : own.shape[1]] = own
        return padded.flatten(0, 1)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Gather the tokens (T, ...) of all ranks from own rows (n, ...); no gradient flows."""
        by_rank = all_gather(x, self.mesh, "tp").unflatten(0, (self.mesh.tp, self.sequences, self.share_of_each))
        return by_rank.transpose(0, 1).flatten(1, 2)[:, : self.length].flatten(0, 1)

    def pick(self, x: Tensor) -> Tensor:
        """Select the kept tokens (k, D) of all tokens (T, D)."""
        return x if self.kept is None else x.index_select(0, self.kept)

    def sum_rows(self, x: Tensor) -> Tensor:
        """Sum (k, D) over ranks and return own rows (n, D) of it, each in its place; no gradient flows."""
        padded = self.share_of_each * self.mesh.tp
        if len(x) < padded * self.sequences:
            places = x.new_zeros(self.sequences, padded, *x.shape[1:])
            if self.kept is None:
                places[:, : self.length] = x.unflatten(0, (self.sequences, self.length))
            else:
                places[0].index_copy_(0, self.kept, x)
            x = places.flatten(0, 1)
        by_rank = x.unflatten(0, (self.sequences, self.mesh.tp, self.share_of_each)).transpose(0, 1)
        return reduce_scatter(by_rank.flatten(0, 2), self.mesh, "tp")


# The cut and its positions are plain attributes of the context. Among the saved tensors they would come after a matrix
# product, and recomputation, which ends with the last saved tensor, would have to repeat that product too.
class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cut: TokenCut) -> Tensor:
        ctx.cut = cut
        return cut.own_rows(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.all_tokens(grad), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cut: TokenCut) -> Tensor:
        ctx.cut = cut
        return cut.all_tokens(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.own_rows(grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cut: TokenCut) -> Tensor:
        ctx.cut = cut
        return cut.pick(cut.all_tokens(x))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.sum_rows(grad), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cut: TokenCut) -> Tensor:
        ctx.cut = cut
        return cut.sum_rows(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.pick(ctx.cut.all_tokens(grad)), None
