"""The kernel distance of two sets of Inception's features is the KID (Binkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor

from megavtp.errors import UserError


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Average the unbiased squared MMD of ``x`` (n, d) and ``y`` (m, d) over random subsets; return mean and std.

    The kernel is (x . y / d + 1)^3. The subsets are drawn without replacement and depend on ``seed`` and the sizes
    alone. They have ``subset_size`` rows, or as many as the smaller set has. Unlike the Frechet distance the mean is
    unbiased for any number of samples, so it may be below zero. Raises ``UserError`` for fewer than two rows.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise UserError(f"a kernel distance of {len(x)} and {len(y)} images: use at least 2 of each, better 1,000")
    draw = torch.Generator().manual_seed(seed)
    if len(x) == len(y) == size:
        subsets = 1  # every subset is the whole
    values = torch.empty(subsets, dtype=torch.float64, device=x.device)
    for i in range(subsets):
        rows = [torch.randperm(len(features), generator=draw)[:size].to(features.device) for features in (x, y)]
        values[i] = _mmd(x[rows[0]].double(), y[rows[1]].double())
    return float(values.mean()), float(values.std(correction=0))


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """Estimate without bias for equally many rows: pairs of a row with itself do not count."""
    n = len(x)
    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (_kernel(x, x), _kernel(y, y)))
    return within - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
