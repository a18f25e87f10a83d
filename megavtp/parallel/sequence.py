"""Sequence parallelism (Megatron-LM, arXiv 2205.05198): tensor-parallel ranks also share the tokens.

Norms, layer scales, stochastic depth and residual sums work on one token at a time. Plain tensor parallelism does them
on all tokens on every rank; here each rank does them on its own rows of the packed tokens, and holds only these for
the backward pass. A column-parallel layer gathers the rows, a row-parallel one sums and scatters them: together they
send what the two all-reduces would.

Letters: T packed tokens, n rows of a rank, k tokens that a branch keeps, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.parallel.collectives import all_gather, copy_to_tp, reduce_scatter, with_gradient
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
            rows are sent: with numbers this uneven, cutting the kept ones anew would need a further exchange.
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
    def rows_of_each(self) -> int:
        """The number of rows that this rank has of each sequence; n is ``sequences`` times that."""
        return ceil_div(self.length, self.mesh.tp)

    def split(self, x: Tensor) -> Tensor:
        """Return own rows (n, ...) of x (T, ...), which is the same on every rank; the gradient is gathered."""
        return with_gradient(x, self.own_rows, self.all_tokens)

    def join(self, x: Tensor) -> Tensor:
        """Return all tokens (T, D) from own rows (n, D). What follows must be the same on every rank, as each keeps its
        own rows of the gradient."""
        return with_gradient(x, self.all_tokens, self.own_rows)

    def gather(self, x: Tensor) -> Tensor:
        """Return the kept tokens of all ranks (k, D) from own rows (n, D); the gradient is summed and scattered."""
        return with_gradient(x, self._kept_tokens, self._sum_rows)

    def reduce(self, x: Tensor) -> Tensor:
        """Sum each rank's x (k, D) for the kept tokens, and return own rows of the sum (n, D), 0 where a token is not
        kept; the gradient is gathered."""
        return with_gradient(x, self._sum_rows, self._kept_tokens)

    def own_rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of (T, ...), padded with zeros; no gradient flows."""
        each = x.detach().unflatten(0, (self.sequences, self.length))
        own = each[:, self.mesh.tp_rank * self.rows_of_each :][:, : self.rows_of_each]
        if own.shape[1] == self.rows_of_each:
            # A view would keep the tokens of the other ranks alive.
            return own.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        padded = own.new_zeros(self.sequences, self.rows_of_each, *x.shape[1:])
        padded[:, : own.shape[1]] = own
        return padded.flatten(0, 1)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Gather the tokens (T, ...) of all ranks from own rows (n, ...); no gradient flows."""
        by_rank = all_gather(x, self.mesh, "tp").unflatten(0, (self.mesh.tp, self.sequences, self.rows_of_each))
        return by_rank.transpose(0, 1).flatten(1, 2)[:, : self.length].flatten(0, 1)

    def _kept_tokens(self, x: Tensor) -> Tensor:
        x = self.all_tokens(x)
        return x if self.kept is None else x.index_select(0, self.kept)

    def _sum_rows(self, x: Tensor) -> Tensor:
        """Sum (k, D) over ranks and return own rows (n, D) of it, each in its place; no gradient flows."""
        padded = self.rows_of_each * self.mesh.tp
        if len(x) < padded * self.sequences:
            places = x.new_zeros(self.sequences, padded, *x.shape[1:])
            if self.kept is None:
                places[:, : self.length] = x.unflatten(0, (self.sequences, self.length))
            else:
                places[0].index_copy_(0, self.kept, x)
            x = places.flatten(0, 1)
        by_rank = x.unflatten(0, (self.sequences, self.mesh.tp, self.rows_of_each)).transpose(0, 1)
        return reduce_scatter(by_rank.flatten(0, 2), self.mesh, "tp")


def on_own_rows(parameter: Tensor, cut: TokenCut | None) -> Tensor:
    """Return a parameter that all ranks hold, for use on own rows: its gradient is summed over ranks in the graph, so
    that no ZeRO stage has to know about it. Without a cut there is nothing to sum."""
    return parameter if cut is None else copy_to_tp(parameter, cut.mesh)
