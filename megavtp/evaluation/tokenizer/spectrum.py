"""The variance of vectors along the eigenvectors of their covariance, which tells how many directions carry them."""

import torch
from torch import Tensor

from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh


class Moments:
    """Adds up the first and second moments of vectors.

    The sums are float64, so their order (batches, ranks) is not seen in what follows from them.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Add vectors (b, C), or maps (b, C, h, w) with a vector for each position of each image; b may be zero."""
        vectors = features.movedim(1, -1).flatten(0, -2).double()
        vectors = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], 1)
        sums = vectors.T @ vectors  # (C + 1, C + 1): the second moments, and in the last row the first, and the count
        self._sums = sums if self._sums is None else self._sums + sums

    def spectrum(self, mesh: Mesh) -> Tensor:
        """Return the shares of the variance (C,) along the covariance's eigenvectors, the largest first.

        This is a collective call. The shares are NaN if the vectors do not vary or are not finite.
        """
        assert self._sums is not None, "no vectors were added"
        sums = all_reduce(self._sums, mesh, "dp")
        mean = sums[-1, :-1] / sums[-1, -1]
        covariance = sums[:-1, :-1] / sums[-1, -1] - mean.outer(mean)
        # Below this, the variance is what rounding in float64 leaves of a constant.
        if not covariance.trace() > 1e-12 * mean.square().sum():
            return torch.full_like(mean, torch.nan)
        variances = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
        return variances / variances.sum()


def effective_rank(shares: Tensor) -> float:
    """Return the exponential of the entropy of the spectrum's ``shares`` (C,): 1 for one direction, C for all alike.

    It is the effective rank of the covariance matrix in the sense of Roy and Vetterli (EUSIPCO 2007), whose singular
    values are the variances.
    """
    return torch.special.entr(shares).sum().exp().item()


def spectrum_metrics(shares: Tensor) -> dict[str, float]:
    """Compute what the metrics say of the spectrum's ``shares`` (C,)."""
    return {"latents/effective_rank": effective_rank(shares), "latents/first_component": shares[0].item()}
