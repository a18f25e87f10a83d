import pytest
import torch

from megavtp.objectives import centering
from megavtp.objectives.centering import center_bias, sinkhorn_bias, update_center


def plain_sinkhorn(logits, temperature, iterations):
    """The textbook iteration on the matrix itself, in float64, on logits small enough for exp."""
    q = (logits.double() / temperature).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def rows(n=20, d=6, k=9, magnitude=1.0):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, d, generator=g) * magnitude, torch.randn(k, d, generator=g)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("keep", [True, False])
def test_sinkhorn_equals_the_plain_iteration(monkeypatch, iterations, keep):
    monkeypatch.setattr(centering, "KEEP_ELEMENTS", 2**26 if keep else 0)
    features, W = rows()
    bias = sinkhorn_bias(features.split([7, 0, 12, 1]), W, 0.5, iterations=iterations, rows_at_once=5)
    got = (features @ W.T / 0.5 + bias).softmax(-1)
    torch.testing.assert_close(got.double(), plain_sinkhorn(features @ W.T, 0.5, iterations), rtol=1e-4, atol=1e-7)


def test_sinkhorn_balances_the_prototypes():
    features, W = rows(n=40)
    bias = sinkhorn_bias([features], W, 0.5, iterations=100)
    share = (features @ W.T / 0.5 + bias).softmax(-1).sum(0)
    torch.testing.assert_close(share, torch.full((9,), 40 / 9), rtol=1e-3, atol=0)


def test_sinkhorn_survives_logits_that_overflow_exp():
    features, W = rows(magnitude=100.0)
    bias = sinkhorn_bias([features], W, 0.04, iterations=3, rows_at_once=3)
    target = (features @ W.T / 0.04 + bias).softmax(-1)
    assert bias.isfinite().all() and (features @ W.T / 0.04).max() > 1000
    torch.testing.assert_close(target.sum(-1), torch.ones(20))
    double = sinkhorn_bias([features.double()], W.double(), 0.04, iterations=3)
    difference = (bias.double() - bias[0] - double + double[0]).abs().max()  # a common constant means nothing
    assert difference < 1e-6 * double.abs().max()


def on_logarithms(logits, iterations):
    """The iteration in float64, where no power can overflow or vanish."""
    z, bias = logits.double(), torch.zeros(logits.shape[1], dtype=torch.float64)
    for index in range(iterations):
        rows = (z + bias).logsumexp(1, keepdim=True) if index else 0.0
        bias = -(z - rows).logsumexp(0)
    return (z + bias).softmax(-1)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("iterations", [1, 3, 40])
@pytest.mark.parametrize("kind", ["3.6", "one prototype is far from all", "one row is far from all"])
def test_sinkhorn_is_right_where_powers_overflow_or_vanish(monkeypatch, keep, iterations, kind):
    """exp(3.6 / 0.04) is no float32, and exp(-90) none that is not 0: a row or a column of powers would be NaN."""
    monkeypatch.setattr(centering, "KEEP_ELEMENTS", 2**26 if keep else 0)
    features, _ = rows(n=20, d=9)
    logits = features.clamp(-1, 1) if kind != "3.6" else features * 3.6 / features.abs().max()
    if kind != "3.6":
        (logits[:, 4] if "prototype" in kind else logits[7]).sub_(5.0)
    bias = sinkhorn_bias([logits], torch.eye(9), 0.04, iterations=iterations, rows_at_once=6)
    target = (logits / 0.04 + bias).softmax(-1)
    torch.testing.assert_close(target.double(), on_logarithms(logits / 0.04, iterations), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("features", [[], [torch.zeros(0, 6)]])
def test_no_rows_leave_everything_as_it_is(features):
    W = rows()[1]
    assert torch.equal(sinkhorn_bias(features, W, 0.07, iterations=3), torch.zeros(9))
    center = torch.randn(9)
    assert torch.equal(update_center(center, features, W, momentum=0.9)(), center)


def test_one_row():
    features, W = rows(n=1)
    target = (features @ W.T / 0.07 + sinkhorn_bias([features], W, 0.07, iterations=3)).softmax(-1)
    torch.testing.assert_close(target, torch.full((1, 9), 1 / 9), rtol=1e-4, atol=0)


def test_center_follows_the_mean_logits():
    features, W = rows()
    center = torch.zeros(9)
    for _ in range(2):
        center = update_center(center, features.split([15, 5]), W, momentum=0.9)()
    torch.testing.assert_close(center, (features @ W.T).mean(0) * (1 - 0.9**2))
    logits = features @ W.T
    torch.testing.assert_close(
        (logits / 0.07 + center_bias(center, 0.07)).softmax(-1), ((logits - center) / 0.07).softmax(-1)
    )
