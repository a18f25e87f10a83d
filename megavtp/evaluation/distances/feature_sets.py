"""Two sets of feature vectors are compared by the Frechet distance (Heusel et al., arXiv 1706.08500, equation 6), the
kernel distance (Binkowski et al., arXiv 1801.01401), and improved precision and recall (Kynkaanniemi et al., arXiv
1904.06991).

All of it is computed in float64. Letters: d feature dimensions, b rows of a batch, n and m rows of two sets.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.errors import UserError
from megavtp.evaluation.ranking import row_blocks
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import SINGLE, Mesh

_ROWS = 512  # rows added to the moments at one time, so that the result does not depend on the batch size
_COLUMNS = 256  # of the scatter matrix that are computed at one time, down to the diagonal
# Tolerance of squared distances, relative to the longest vector: equal images must be 0 apart despite rounding.
_ROUNDING = 1e-12
_ENOUGH = 1e-10  # relative error of a sum of singular values


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian in feature space: ``mean`` (d,) and unbiased ``covariance`` (d, d), float64 on one device.

    ``count`` is the number of images; None if unknown (statistics from a file).
    """

    mean: Tensor
    covariance: Tensor
    count: int | None


@dataclass(frozen=True)
class FeatureSummary:
    """Has ``statistics`` of all images of a source, and ``features`` (n, d), float32, of all or a part of them, in the
    order of their ``numbers`` (n,) in the source."""

    statistics: FeatureStatistics
    features: Tensor
    numbers: Tensor


class FeatureMoments:
    """The mean and scatter matrix of a stream of feature vectors, in float64.

    Blocks are merged by their means and the scatter about these (Chan et al. 1979). Unlike the textbook formula, this
    does not subtract large sums from each other.
    """

    def __init__(self, dims: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._mean = torch.zeros(dims, dtype=torch.float64, device=device)
        self._upper = torch.zeros(dims, dims, dtype=torch.float64, device=device)  # the scatter's upper triangle
        self._waiting = torch.empty(0, dims, device=device)

    def update(self, features: Tensor) -> None:
        """Add ``features`` (b, d) on the moments' device."""
        self._waiting = torch.cat([self._waiting, features.detach()])
        while len(self._waiting) >= _ROWS:
            self._fold(self._waiting[:_ROWS])
            self._waiting = self._waiting[_ROWS:]

    def _fold(self, rows: Tensor) -> None:
        rows = rows.double()
        mean = rows.mean(0)
        shift = mean - self._mean
        total = self.count + len(rows)
        x = torch.cat([rows - mean, math.sqrt(self.count * len(rows) / total) * shift[None]])
        for first in range(0, x.shape[1], _COLUMNS):  # half of x^T x is enough, as it is symmetric
            own = slice(first, first + _COLUMNS)
            self._upper[own, first:].addmm_(x[:, own].T, x[:, first:])
        self._mean += shift * (len(rows) / total)
        self.count = total

    def statistics(self, mesh: Mesh = SINGLE) -> FeatureStatistics:
        """Return mean and covariance over all data-parallel ranks, in a collective call with the same result on each.

        ``UserError`` for fewer than two rows in all, which have no covariance.
        """
        if len(self._waiting):
            self._fold(self._waiting)
            self._waiting = self._waiting[:0]
        count = int(all_reduce(torch.tensor(self.count, device=self._mean.device), mesh, "dp"))
        if count < 2:
            raise UserError(f"{count} image{'s' * (count != 1)} cannot give a covariance: use 2 or more, say 10,000")
        mean = all_reduce(self._mean * (self.count / count), mesh, "dp")
        shift, scatter = self._mean - mean, self._upper.triu() + self._upper.triu(1).T
        scatter = all_reduce(scatter + torch.outer(shift, shift) * self.count, mesh, "dp")
        return FeatureStatistics(mean, scatter / (count - 1), count)


def statistics_of(features: Tensor) -> FeatureStatistics:
    """Return mean and covariance of the rows of ``features`` (n, d). ``UserError`` for fewer than two."""
    moments = FeatureMoments(features.shape[1], features.device)
    moments.update(features)
    return moments.statistics()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return d2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), the number that papers print; it is at least 0."""
    assert a.mean.shape == b.mean.shape, "features of different networks"
    cross = _trace_of_root(a.covariance, b.covariance)
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """Return tr (A B)^(1/2) of covariances (d, d), with 10 digits or more even if one is singular.

    With A = F F^T and B = G G^T, it is the sum of the singular values of F^T G. Their squares are found in less than
    half of the time, with the same error for all, which is large beside small ones; so they are taken if the sum of
    their roots is exact enough.
    """
    (f, f_fails), (g, g_fails) = torch.linalg.cholesky_ex(a), torch.linalg.cholesky_ex(b)
    if not f_fails and not g_fails:
        product = f.T @ g
        squares = torch.linalg.eigvalsh(product.T @ product)
        noise, roots = squares[-1] * math.sqrt(len(squares)) * torch.finfo(squares.dtype).eps, squares.sqrt()
        if squares[0] > noise and (noise / (2 * roots)).sum() < _ENOUGH * roots.sum():
            return roots.sum()
    return torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()


def _factor(covariance: Tensor) -> Tensor:
    """Return F (d, d) with F F^T = covariance; eigenvalues that are rounding noise count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors * torch.where(values > noise, values, 0.0).sqrt()


def few_samples_warning(name: str, what: str, statistics: FeatureStatistics) -> str | None:
    """Word a warning if the covariance of ``what`` (such as "samples") is singular as they are too few."""
    dims = len(statistics.mean)
    if statistics.count is None or statistics.count > dims:
        return None
    return (
        f"{name}: {statistics.count} {what} are too few for a covariance of {dims} dimensions (it is singular), and "
        f"the distance is biased upward; use more than {dims}, and compare only numbers from equally many"
    )


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Average the unbiased squared MMD of ``x`` (n, d) and ``y`` (m, d) over random subsets; return mean and std.

    The kernel is (x . y / d + 1)^3; on Inception's features the mean is the KID. The subsets are drawn without
    replacement and depend on ``seed`` and the sizes alone. They have ``subset_size`` rows, or as many as the smaller
    set has. Unlike the Frechet distance the mean is unbiased for any number of samples, so it may be below zero. Raises
    ``UserError`` for fewer than two rows.
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
    inside = [(_distances(points[rows], members) <= reach).any(1) for rows in row_blocks(len(points), len(members))]
    return float(torch.cat(inside).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return squared distances (rows of x, rows of y)."""
    return (_squares(x)[:, None] + _squares(y) - 2 * x @ y.T).clamp_min_(0)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(1)
