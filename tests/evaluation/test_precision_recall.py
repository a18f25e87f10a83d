import numpy as np
import pytest
import torch

from megavtp.errors import UserError
from megavtp.evaluation import ranking
from megavtp.evaluation.distances.feature_sets import precision_recall


def plain(real: np.ndarray, made: np.ndarray, k: int) -> tuple[float, float]:
    """As the paper defines it, by loops."""

    def share(points, members):
        reach = [sorted(np.linalg.norm(a - b) for j, b in enumerate(members) if j != i)[k - 1]
                 for i, a in enumerate(members)]
        hits = [any(np.linalg.norm(p - a) <= r for a, r in zip(members, reach)) for p in points]
        return sum(hits) / len(points)

    return share(made, real), share(real, made)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_plain_loops(k, monkeypatch):
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", 200)  # many blocks
    draw = np.random.default_rng(1)
    real, made = draw.standard_normal((40, 3)), draw.standard_normal((31, 3)) * 0.7 + 0.5
    want = plain(real, made, k)
    assert 0.2 < min(want) and max(want) < 1  # neither end
    assert precision_recall(torch.from_numpy(real), torch.from_numpy(made), k) == want


def test_the_ends():
    x = torch.randn(50, 8)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    one_mode = x[:1] + 1e-4 * torch.randn(50, 8)
    assert precision_recall(x, one_mode)[0] == 1 and precision_recall(x, one_mode)[1] < 0.1


def test_equal_images_are_inside_whatever_the_rounding():
    """Balls about repeated images have no extent."""
    blank = torch.randn(1, 64) * 1000
    real = torch.cat([blank.expand(9, -1), torch.randn(9, 64)])
    assert precision_recall(real, blank.expand(7, -1))[0] == 1


def test_needs_more_than_k():
    with pytest.raises(UserError, match="3 generated images"):
        precision_recall(torch.randn(9, 2), torch.randn(3, 2))
