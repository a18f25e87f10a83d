"""Sinkhorn-Knopp or a running centre, either of which keeps the teacher's prototype distributions from collapsing.

Both turn teacher logits z into targets softmax(z / T + bias) with one bias per prototype. So the loss needs only a
vector (K_local,), and no target matrix exists.

Shape letters: n rows of this rank, d feature size, K_local prototypes on this rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megavtp.objectives.prototypes import prototype_logits, row_logsumexp
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import SINGLE, Mesh

# Logits up to this many elements (256 MiB of float32) are kept over the iterations. More are computed anew each
# time: a product over d = 256 costs a GPU about as long as reading its result back from memory.
KEEP_ELEMENTS = 2**26


@torch.no_grad()
def sinkhorn_bias(
    features: Sequence[Tensor], W: Tensor, temperature: float, *, iterations: int,
    rows_at_once: int = 1024, mesh: Mesh = SINGLE,
) -> Tensor:
    """Run Sinkhorn-Knopp over the rows of all micro-batches and data-parallel ranks -> bias (K_local,), float32.

    ``features``: the micro-batches' teacher features, (n_j, d) each; the counts may differ between ranks and be 0.
    W (K_local, d). After ``iterations`` the assignment of a row is softmax(row W^T / temperature + bias) over all
    prototypes (arXiv 2006.09882, as in DINOv2: prototypes are normalised first, then samples). It works on logarithms,
    so no logit is too large. If there is no row anywhere the bias is 0. No host synchronisation.
    """
    with torch.autocast(W.device.type, enabled=False):
        blocks = [block for part in features if part.shape[0] for block in part.split(rows_at_once)]
        keep = sum(block.shape[0] for block in blocks) * W.shape[0] <= KEEP_ELEMENTS
        kept = [prototype_logits(block, W, temperature) for block in blocks] if keep else None
        bias = torch.zeros(W.shape[0], dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
        for iteration in range(iterations):
            peak, total = torch.full_like(bias, -torch.inf), torch.zeros_like(bias)
            for index, block in enumerate(blocks):
                logits = prototype_logits(block, W, temperature) if kept is None else kept[index]
                if iteration:  # each row's scale from the last bias; the very first rows are taken as they are
                    logits = logits - row_logsumexp(logits + bias, mesh)
                higher = torch.maximum(peak, logits.amax(0))
                total = total * (peak - higher).exp() + (logits - higher).exp_().sum(0)
                peak = higher
            highest = all_reduce(peak, mesh, "dp", "max")  # a rank without rows has the peak -inf
            total = all_reduce(total * (peak - highest).exp(), mesh, "dp")
            # minus log sum_rows exp(logit), over all ranks; without any row the total is NaN (-inf - -inf)
            bias = -torch.where(total > 0, highest + total.log(), 0.0)
        return bias


def center_bias(center: Tensor, temperature: float) -> Tensor:
    """Express softmax centering (DINO, arXiv 2104.14294), softmax((z - center) / T), as a bias (K_local,)."""
    return -center / temperature


@torch.no_grad()
def update_center(
    center: Tensor, features: Sequence[Tensor], W: Tensor, *, momentum: float, mesh: Mesh = SINGLE
) -> Tensor:
    """Return the next centre (K_local,): momentum * center + (1 - momentum) * global mean of the teacher logits.

    ``features`` as in ``sinkhorn_bias``. Call it after the step has used the old centre; the first centre is zeros.
    The mean of logits is the logit of the mean feature, so one product with a vector does it. Without any row on any
    rank the centre stays.
    """
    with torch.autocast(W.device.type, enabled=False):
        sums = torch.zeros(W.shape[1] + 1, dtype=center.dtype, device=W.device)  # features, then the row count
        for part in features:
            sums[:-1] += part.sum(0, dtype=center.dtype)
            sums[-1] += part.shape[0]
        sums = all_reduce(sums, mesh, "dp")
        mean = W.to(center.dtype) @ (sums[:-1] / sums[-1].clamp_min(1))
        return torch.where(sums[-1] > 0, torch.lerp(mean, center, momentum), center)
