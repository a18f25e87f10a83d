"""Multinomial logistic regression on standardised features, as CLIP's linear probe has it (arXiv 2103.00020, appendix
A.3): L-BFGS until it has converged, with the L2 penalty that does best on samples it was not fitted to.

Letters: n samples, D features, C classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.evaluation.probes.labelled import ProbeLabels

PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # half of it times the squared weights is added to the mean loss
_ITERATIONS = 200
_CONSTANT = 1e-5  # a feature whose standard deviation is below this share of its mean is constant but for rounding


@dataclass(frozen=True)
class Standardisation:
    """Subtracts the training samples' mean (D,) and divides by their standard deviation; constants become zero."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Standardisation":
        std, mean = torch.std_mean(x, 0, correction=0)
        return cls(mean, torch.where(std > _CONSTANT * mean.abs(), 1 / std, 0))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


def fit(x: Tensor, ids: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Fit weights (D + 1, C), the last row of which is the bias, to features (n, D) and classes (n,).

    They minimise the mean cross entropy plus ``penalty`` / 2 times the squared weights, without the bias; the search
    begins at ``start``, else at zero. The minimum is that of scikit-learn's LogisticRegression(C=1 / (penalty * n)).
    """
    weights = x.new_zeros(x.shape[1] + 1, classes) if start is None else start.clone()
    weights.requires_grad_()
    search = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        search.zero_grad()
        value = F.cross_entropy(scores(x, weights), ids) + penalty / 2 * weights[:-1].square().sum()
        value.backward()
        return value.item()

    with torch.enable_grad():
        search.step(loss)
    return weights.detach()


def scores(x: Tensor, weights: Tensor) -> Tensor:
    """Return logits (n, C) of features (n, D)."""
    return torch.addmm(weights[-1], x, weights[:-1])


def probe(train: Tensor, test: Tensor, labels: ProbeLabels) -> tuple[Tensor, str]:
    """Return the classes of the test samples that are asked about (m,), and the penalty that was picked, in words.

    ``train`` (samples, D) and ``test`` have the features of all samples of the splits. The cross entropy on the samples
    that pick falls and then rises from the heaviest penalty to the lightest, so the first rise ends the search; the
    accuracy would do so by chance. The picked penalty is fitted again to all training samples.
    """
    x, ids = train[labels.rows.to(train.device)], labels.ids.to(train.device)
    standard, picks = Standardisation.of(x), labels.picks.to(x.device)
    x = standard(x)
    best, least, weights = PENALTIES[0], math.inf, None
    for penalty in PENALTIES:
        weights = fit(x[~picks], ids[~picks], labels.classes, penalty, weights)  # the minimum before is near the next
        loss = F.cross_entropy(scores(x[picks], weights), ids[picks]).item()
        if loss >= least:
            break
        best, least = penalty, loss
    weights = fit(x, ids, labels.classes, best)
    asked = standard(test[labels.test_rows.to(test.device)])
    return scores(asked, weights).argmax(1), f"penalty {best:g}"
