import numpy as np
import pytest
import torch

from megavtp.errors import UserError
from megavtp.evaluation.distances.feature_sets import kernel_distance


def plain(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD by loops over pairs; (x . y / d + 1)^3."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    kernel = lambda a, b: (float(a @ b) / len(a) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


@pytest.fixture
def sets():
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((2, 23, 6)).astype(np.float32)
    return x, y * 1.5 + 0.3


def test_whole_sets_equal_plain_loops(sets):
    mean, spread = kernel_distance(*map(torch.from_numpy, sets))
    assert mean == pytest.approx(plain(*sets), rel=1e-10) and spread == 0


def test_subsets_are_drawn_without_replacement_by_the_seed(sets):
    x, y = map(torch.from_numpy, sets)
    draw = torch.Generator().manual_seed(5)
    values = []
    for _ in range(4):
        rows = [torch.randperm(23, generator=draw)[:9] for _ in range(2)]
        values.append(plain(x[rows[0]].numpy(), y[rows[1]].numpy()))
    options = {"subsets": 4, "subset_size": 9}
    got = kernel_distance(x, y, seed=5, **options)
    assert got == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    assert kernel_distance(x, y, seed=5, **options) == got != kernel_distance(x, y, seed=6, **options)


def test_unbiased_where_the_sets_are_small():
    """The mean over many pairs of small sets from one distribution is 0 within its error; sets have unequal sizes."""
    draw = torch.Generator().manual_seed(0)
    values = [
        kernel_distance(torch.randn(12, 4, generator=draw), torch.randn(9, 4, generator=draw), subsets=5)[0]
        for _ in range(400)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5
    assert min(values) < 0


def test_needs_two_of_each():
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(torch.randn(5, 3), torch.randn(1, 3))
