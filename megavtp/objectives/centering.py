"""Sinkhorn-Knopp or a running centre, either of which keeps the teacher's prototype distributions from collapsing.

Both turn teacher logits z into targets softmax(z / T + bias) with one bias per prototype. So the loss needs only a
vector (K_local,), and no target matrix exists.

Shape letters: n rows of this rank, d feature size, K_local prototypes on this rank.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from megavtp.objectives.prototypes import prototype_logits, row_softmax
from megavtp.parallel.collectives import all_reduce, begin_all_reduce
from megavtp.parallel.mesh import SINGLE, Mesh

# Logits up to this many elements (256 MiB of float32) are kept over the iterations. More are computed anew each
# time: a product over d = 256 costs a GPU about as long as reading its result back from memory.
KEEP_ELEMENTS = 2**26


def sinkhorn_bias(
    features: Sequence[Tensor], W: Tensor, temperature: float, *, iterations: int,
    rows_at_once: int = 1024, mesh: Mesh = SINGLE,
) -> Tensor:
    """Run Sinkhorn-Knopp over the rows of all micro-batches and data-parallel ranks -> bias (K_local,), float32.

    ``features``: the micro-batches' teacher features, (n_j, d) each; the counts may differ between ranks and be 0.
    W (K_local, d). After ``iterations`` the assignment of a row is softmax(row W^T / temperature + bias) over all
    prototypes (arXiv 2006.09882, as in DINOv2: prototypes are normalised first, then samples). If there is no row
    anywhere the bias is 0. No host synchronisation.

    The first iteration works on logarithms, so no logit is too large. From then on a row's assignments sum to 1, and a
    prototype's to 1 / K or more: no sum can overflow or vanish.
    """
    (bias,) = sinkhorn_biases(
        [features], W, temperature, iterations=iterations, rows_at_once=rows_at_once, mesh=mesh
    )
    return bias


@torch.no_grad()
def sinkhorn_biases(
    sets: Sequence[Sequence[Tensor]], W: Tensor, temperature: float, *, iterations: int,
    rows_at_once: int = 1024, mesh: Mesh = SINGLE,
) -> list[Tensor]:
    """Return ``sinkhorn_bias`` of each set of features; while one set's sums travel, the next one computes."""
    biases: dict[int, Tensor] = {}
    with torch.autocast(W.device.type, enabled=False):
        under_way = {
            index: _sinkhorn(_Rows(features, W, temperature, rows_at_once), len(W) * mesh.tp, iterations, mesh)
            for index, features in enumerate(sets)
        }
        while under_way:
            for index, work in list(under_way.items()):
                try:
                    next(work)
                except StopIteration as end:
                    biases[index] = end.value
                    del under_way[index]
    return [biases[index] for index in range(len(sets))]


def _sinkhorn(rows: "_Rows", prototypes: int, iterations: int, mesh: Mesh) -> Generator[None, None, Tensor]:
    """Return the bias of one set; it pauses whenever a sum over the ranks has begun."""
    bias, count = yield from _first_bias(rows, mesh)
    first = bias
    if rows.kept is not None and iterations > 1:
        for logits in rows.kept:  # they become the assignments under the first bias
            row_softmax(torch.add(logits, bias, out=rows.room[: len(logits)]), mesh, out=logits)
    for _ in range(iterations - 1):
        total = torch.zeros_like(bias)
        if rows.kept is not None:  # the matrix stays, with a factor for each row and each prototype
            factors = (bias - first).exp()
            for assigned in rows.kept:
                total += all_reduce(assigned @ factors, mesh, "tp").reciprocal_() @ assigned
            total *= factors
        else:
            for logits in rows.logits():
                assigned = rows.room[: len(logits)]
                row_softmax(logits.add_(bias), mesh, out=assigned)
                total += assigned.sum(0)
        total = yield from _over_ranks(total, mesh)
        share = total * (prototypes / count)  # 1 on the mean
        bias = bias - torch.where(count > 0, share.log(), 0.0)
    return bias


def _over_ranks(x: Tensor, mesh: Mesh, op: Literal["sum", "max"] = "sum") -> Generator[None, None, Tensor]:
    """Reduce over dp, and pause while that is under way."""
    result = begin_all_reduce(x, mesh, "dp", op)
    yield
    return result()


class _Rows:
    """All rows' logits by blocks: kept where they fit, or else computed each time.

    ``room``: memory for a block's; the first touch of new memory would take a CPU longer than a softmax in it.
    """

    def __init__(self, features: Sequence[Tensor], W: Tensor, temperature: float, rows_at_once: int):
        self._blocks = [block for part in features if part.shape[0] for block in part.split(rows_at_once)]
        self._W, self._temperature = W.to(self._blocks[0].dtype) if self._blocks else W, temperature
        self.count = sum(map(len, self._blocks))
        wide = torch.promote_types(W.dtype, torch.float32)
        most = max(map(len, self._blocks), default=0)
        self.room = W.new_empty(most, len(W), dtype=wide)
        self.kept: list[Tensor] | None = None
        if self.count * len(W) <= KEEP_ELEMENTS:
            self.kept = [prototype_logits(block, self._W, temperature) for block in self._blocks]

    def logits(self) -> Iterator[Tensor]:
        """Yield each block's logits, (n, K_local), which the caller may overwrite unless they are ``kept``."""
        if self.kept is not None:
            yield from self.kept
            return
        computed = torch.empty_like(self.room)
        for block in self._blocks:
            yield prototype_logits(block, self._W, self._temperature, out=computed[: len(block)])


def _first_bias(rows: _Rows, mesh: Mesh) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """Return minus log sum_rows exp(logit), (K_local,), and the number of rows, (), over all ranks."""
    peak, total = rows.room.new_full(rows.room.shape[1:], -torch.inf), rows.room.new_zeros(rows.room.shape[1:])
    for logits in rows.logits():
        higher = torch.maximum(peak, logits.amax(0))
        powers = torch.sub(logits, higher, out=rows.room[: len(logits)]).exp_()
        peak, total = higher, total * (peak - higher).exp_() + powers.sum(0)
    highest = yield from _over_ranks(peak, mesh, "max")  # a rank without rows has the peak -inf
    total = torch.cat([total * (peak - highest).exp_(), total.new_full((1,), rows.count)])
    total = yield from _over_ranks(total, mesh)
    total, count = total.split([len(peak), 1])
    return -torch.where(count > 0, highest + total.log(), 0.0), count


def center_bias(center: Tensor, temperature: float) -> Tensor:
    """Express softmax centering (DINO, arXiv 2104.14294), softmax((z - center) / T), as a bias (K_local,)."""
    return -center / temperature


@torch.no_grad()
def update_center(
    center: Tensor, features: Sequence[Tensor], W: Tensor, *, momentum: float, mesh: Mesh = SINGLE
) -> Callable[[], Tensor]:
    """Begin to sum the features of all ranks. What is returned waits for that and gives the next centre (K_local,):
    momentum * center + (1 - momentum) * global mean of the teacher logits.

    ``features`` as in ``sinkhorn_bias``. The first centre is zeros. The mean of logits is the logit of the mean
    feature, so one product with a vector does it. Without any row on any rank the centre stays.
    """
    sums = torch.zeros(W.shape[1] + 1, dtype=center.dtype, device=W.device)  # features, then the row count
    for part in features:
        sums[:-1] += part.sum(0, dtype=center.dtype)
        sums[-1] += part.shape[0]
    summed = begin_all_reduce(sums, mesh, "dp")

    @torch.no_grad()
    def following() -> Tensor:
        sums = summed()
        with torch.autocast(W.device.type, enabled=False):
            mean = W.to(center.dtype) @ (sums[:-1] / sums[-1].clamp_min(1))
        return torch.where(sums[-1] > 0, torch.lerp(mean, center, momentum), center)

    return following
