"""Sequence parallelism (Megatron-LM, arXiv 2205.05198): tensor-parallel ranks also share the tokens.

Norms, layer scales, stochastic depth and residual sums work on one token at a time. Plain tensor parallelism does them
on all tokens on every rank; here each rank does them on its own rows of the packed tokens, and holds only these for
the backward pass. A column-parallel layer gathers the rows, a row-parallel one sums and scatters them: together they
send what the two all-reduces would.

Letters: T tokens of all sequences, n = ceil(T / tp) rows of a rank, k tokens that a branch keeps, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavtp.parallel.collectives import all_gather, copy_to_tp, reduce_scatter
from megavtp.parallel.mesh import Mesh


@dataclass(frozen=True)
class TokenCut:
    """How packed tokens (T, D) lie on the tp ranks: rank r has rows r * n to (r + 1) * n.

    Rows from T on are padding: they come from nowhere, reach nothing and send back no gradient.

    Attributes:
        total: T.
        kept: positions (k,) among the T tokens that a residual branch works on, for ``gather`` and ``reduce``; None =
            all. The rows of a rank hold kept and other tokens alike, in whatever proportion chance gives it, so all
            rows are sent: with shares this uneven, cutting the kept ones anew would need a further exchange.
    """

    mesh: Mesh
    total: int
    kept: Tensor | None = None

    @property
    def rows(self) -> int:
        """n, of this rank as of every other."""
        return -(-self.total // self.mesh.tp)

    def keeping(self, kept: Tensor) -> TokenCut:
        return replace(self, kept=kept)

    def split(self, x: Tensor) -> Tensor:
        """(T, ...), the same on every rank -> own rows (n, ...); the gradient is gathered."""
        return _Split.apply(x, self)

    def join(self, x: Tensor) -> Tensor:
        """Own rows (n, D) -> all tokens (T, D), for use that is the same on every rank; each keeps its rows of the
        gradient."""
        return _Join.apply(x, self)

    def gather(self, x: Tensor) -> Tensor:
        """Own rows (n, D) -> the kept tokens of all ranks (k, D); the gradient is summed over ranks and scattered."""
        return _Gather.apply(x, self)

    def reduce(self, x: Tensor) -> Tensor:
        """Each rank's summand for the kept tokens (k, D) -> own rows of the sum (n, D), 0 where a token is not kept;
        the gradient is gathered."""
        return _Reduce.apply(x, self)

    def share(self, parameter: Tensor) -> Tensor:
        """A parameter that all ranks hold, for use on own rows: its gradient is summed over ranks, in the graph, so
        that no sharding stage has to know about it."""
        return copy_to_tp(parameter, self.mesh)

    def own_rows(self, x: Tensor) -> Tensor:
        """Rows of this rank of (T, ...), padded with zeros; no gradient flows."""
        own = x.detach()[self.mesh.tp_rank * self.rows :][: self.rows]
        if len(own) == self.rows:
            return own.clone()  # not a view, which would keep the tokens of the other ranks alive
        padded = own.new_zeros(self.rows, *own.shape[1:])
        padded[: len(own)] = own
        return padded

    def all_tokens(self, x: Tensor) -> Tensor:
        """The tokens (T, ...) of all ranks from own rows (n, ...); no gradient flows."""
        return all_gather(x, self.mesh, "tp")[: self.total]

    def pick(self, x: Tensor) -> Tensor:
        """The kept ones (k, D) of all tokens (T, D)."""
        return x if self.kept is None else x.index_select(0, self.kept)

    def sum_rows(self, x: Tensor) -> Tensor:
        """Own rows (n, D) of the sum over ranks of (k, D), put in their places; no gradient flows."""
        padded = self.rows * self.mesh.tp
        if len(x) < padded:
            places = x.new_zeros(padded, *x.shape[1:])
            if self.kept is None:
                places[: self.total] = x
            else:
                places.index_copy_(0, self.kept, x)
            x = places
        return reduce_scatter(x, self.mesh, "tp")


# The cut, and the positions in it, hang on the context as they are. Put among the saved tensors they would come after
# a matrix product, and recomputation, which ends with the last saved tensor, would have to make that product too.
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
