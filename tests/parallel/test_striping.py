"""Cuts of towers into chunks."""

from __future__ import annotations

import itertools

import pytest

from megavtp.parallel.striping import Part, Stripe, cut_tower


def brute_force(costs: list[float], chunks: int, first: float, last: float) -> float:
    """The least highest cost over all cuts."""
    best = float("inf")
    least = 1 if len(costs) >= chunks else 0
    for inner in itertools.combinations_with_replacement(range(len(costs) + 1), chunks - 1):
        cuts = [0, *inner, len(costs)]
        parts = [costs[a:b] for a, b in itertools.pairwise(cuts)]
        if min(map(len, parts)) >= least:
            sums = [sum(part) for part in parts]
            sums[0] += first
            sums[-1] += last
            best = min(best, max(sums))
    return best


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("costs", [[1.0] * 7, [1.0], [3.0, 1, 1, 1, 2], [0.5, 4, 0.5, 0.5, 1, 1]])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.4, 1.7), (2.5, 0.0)])
def test_cut_is_optimal(costs: list[float], chunks: int, ends: tuple[float, float]) -> None:
    found = cut_tower(costs, chunks, first=ends[0], last=ends[1])
    assert [i for part in found for i in part] == list(range(len(costs))) and len(found) == chunks
    assert all(len(part) for part in found) or len(costs) < chunks
    sums = [sum(costs[i] for i in part) for part in found]
    sums[0] += ends[0]
    sums[-1] += ends[1]
    assert max(sums) == pytest.approx(brute_force(costs, chunks, *ends))


def test_equal_blocks_are_dealt_evenly() -> None:
    assert [len(part) for part in cut_tower([1.0] * 24, 8)] == [3] * 8
    assert sorted(len(part) for part in cut_tower([1.0] * 10, 4)) == [2, 2, 3, 3]
    assert sorted(len(part) for part in cut_tower([1.0], 3)) == [0, 0, 1]
    assert [len(part) for part in cut_tower([1.0] * 5, 2, last=1.0)] == [3, 2]


def test_stripe_of_each_rank() -> None:
    chunks = cut_tower([1.0] * 8, 4)
    stripes = [Stripe(chunks, 2, rank) for rank in range(2)]
    assert stripes[0].blocks == [0, 1, 4, 5] and stripes[1].blocks == [2, 3, 6, 7]
    assert [(s.first, s.last) for s in stripes] == [(True, False), (False, True)]
    assert stripes[1].part(3) == Part(range(6, 8), False, True) and stripes[0].part(2).blocks == range(4, 6)
    assert Stripe(cut_tower([1.0] * 3, 1)).part(None) == Part(range(3), True, True)
