"""This is the improved precision and recall of generated images (Kynkaanniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megavtp.errors import UserError
from megavtp.evaluation.ranking import row_blocks

# Tolerance of squared distances, relative to the longest vector: equal images must be 0 apart despite rounding.
_ROUNDING = 1e-12


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Return the share of ``generated`` (m, d) in the manifold of ``real`` (n, d), and the reverse.

    The manifold of a set is the union of balls about its members that reach to their ``k``-th nearest other member.
    All is computed in float64, in blocks. ``UserError`` for sets of no more than ``k`` rows.
    """
    for name, features in (("reference", real), ("generated", generated)):
        if len(features) <= k:
            raise UserError(f"precision and recall of {len(features)} {name} images: use more than {k}, better 10,000")
    real, generated = real.double(), generated.double()
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, members: Tensor, k: int) -> float:
    """Return the share of ``points`` in the manifold of ``members``."""
    reach = torch.empty(len(members), dtype=members.dtype, device=members.device)  # squared, to the k-th nearest other
    for rows in row_blocks(len(members), len(members)):
        distances = _distances(members[rows], members)
        distances.diagonal(rows.start).fill_(-math.inf)  # a member is nearest to itself
        reach[rows] = distances.kthvalue(k + 1, dim=1).values
    reach += _ROUNDING * torch.maximum(_squares(points).max(), _squares(members).max())
    inside = [
        (_distances(points[rows], members) <= reach).any(1) for rows in row_blocks(len(points), len(members))
    ]
    return float(torch.cat(inside).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return squared distances (rows of x, rows of y)."""
    return (_squares(x)[:, None] + _squares(y) - 2 * x @ y.T).clamp_min_(0)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(1)
