import math

import pytest
import torch
import torch.nn.functional as F

from megavtp.evaluation import ranking
from megavtp.evaluation.ranking import chance_recall, match_rank, recall


def slow_rank(q, g, qi, gi, qg=None, gg=None):
    """Sort every query's candidates by similarity, wrong before right on a tie."""
    out = []
    for row in range(len(q)):
        candidates = [
            (-(q[row] @ g[c]).item(), (qi[row] == gi[c]).item())
            for c in range(len(g))
            if qg is None or qg[row] != gg[c]
        ]
        order = sorted(candidates)
        hits = [i for i, (_, right) in enumerate(order) if right]
        wrong_before = sum(not right for _, right in order[: hits[0]]) if hits else math.inf
        out.append(wrong_before)
    return out


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("block", [1, 40, 2**24])
def test_equals_sorting(monkeypatch, grouped, block):
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", block)
    draw = torch.Generator().manual_seed(0)
    q, g = torch.randn(23, 4, generator=draw), torch.randn(31, 4, generator=draw)
    qi, gi = torch.randint(0, 9, (23,), generator=draw), torch.randint(0, 9, (31,), generator=draw)
    groups = (torch.randint(0, 2, (23,), generator=draw), torch.randint(0, 2, (31,), generator=draw)) if grouped else ()
    got = match_rank(q, g, qi, gi, *groups)
    want = slow_rank(q, g, qi, gi, *groups)
    assert [math.inf if r > 1000 else r for r in got.tolist()] == want


def test_collapsed_and_diverged_models_find_nothing():
    ids = torch.arange(50)
    same = torch.ones(50, 3)
    assert recall(match_rank(same, same, ids, ids), 10) == 0
    broken = torch.full((50, 3), math.nan)
    assert recall(match_rank(broken, broken, ids, ids), 10) == 0
    half = F.one_hot(ids).float()
    half[3] = math.nan  # one bad gallery entry pushes every other query down by one, none up
    assert match_rank(F.one_hot(ids).float(), half, ids, ids).tolist() == [1] * 3 + [49] + [1] * 46


def test_query_without_match_is_never_found():
    ranks = match_rank(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 7]), torch.arange(3))
    assert recall(ranks, 1) == recall(ranks, 100) == pytest.approx(2 / 3)


def test_chance_recall_is_the_closed_form():
    matches, candidates = torch.tensor([1, 2, 3, 5]), torch.tensor([10, 10, 4, 5])
    for k in (1, 2, 5, 10):
        want = [1 - math.comb(n - m, k) / math.comb(n, k) if k <= n else 1.0 for m, n in zip(matches, candidates)]
        assert chance_recall(matches, candidates, k) == pytest.approx(sum(want) / 4)


def test_random_features_reach_chance():
    draw = torch.Generator().manual_seed(0)
    x, y, ids = torch.randn(2000, 16, generator=draw), torch.randn(200, 16, generator=draw), torch.arange(2000) % 200
    ranks = match_rank(x, y, ids, torch.arange(200))
    for k in (1, 5, 10):
        sigma = math.sqrt(k / 200 * (1 - k / 200) / 2000)
        assert abs(recall(ranks, k) - k / 200) < 4 * sigma
