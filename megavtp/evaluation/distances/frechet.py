"""The Frechet distance compares two sets of feature vectors (Heusel et al., arXiv 1706.08500, equation 6).

    d2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

All of it is computed in float64. Letters: d feature dimensions, b rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.errors import UserError
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import SINGLE, Mesh

_ROWS = 512  # rows added to the moments at one time, so that the result does not depend on the batch size


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian in feature space. Both tensors are float64 and on one device.

    Attributes:
        mean: (d,).
        covariance: (d, d), unbiased (divided by count - 1).
        count: the number of images; None if unknown (statistics from a file).
    """

    mean: Tensor
    covariance: Tensor
    count: int | None


class FeatureMoments:
    """The mean and scatter matrix of a stream of feature vectors, in float64.

    Blocks are merged by their means and the scatter about these (Chan et al. 1979). Unlike the textbook formula, this
    does not subtract large sums from each other.
    """

    def __init__(self, dims: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._mean = torch.zeros(dims, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dims, dims, dtype=torch.float64, device=device)
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
        centred = rows - mean
        shift = mean - self._mean
        total = self.count + len(rows)
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(shift, shift) * (self.count * len(rows) / total)
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
        shift = self._mean - mean
        scatter = all_reduce(self._scatter + torch.outer(shift, shift) * self.count, mesh, "dp")
        return FeatureStatistics(mean, scatter / (count - 1), count)


def statistics_of(features: Tensor) -> FeatureStatistics:
    """Return mean and covariance of the rows of ``features`` (n, d). ``UserError`` for fewer than two."""
    moments = FeatureMoments(features.shape[1], features.device)
    moments.update(features)
    return moments.statistics()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared distance d2, which is the number that papers print; it is at least 0.

    With C = F F^T for both, tr (C1 C2)^(1/2) is the sum of the singular values of F1^T F2. Unlike a root of the product
    C1 C2, this takes no root of rounding noise, and keeps 10 digits or more even if a covariance is singular.
    """
    assert a.mean.shape == b.mean.shape, "features of different networks"
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross))


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
