"""SampleOrder and StepOrder: the order of the data as properties, on small data sets, exhaustively."""

import pickle

import numpy as np
import pytest

from megavtp.data.order import SampleOrder, StepOrder
from megavtp.errors import UserError

LAYOUTS = [
    # shard counts, streams, block
    ((10,), 1, 4),
    ((10,), 3, 100),
    ((7, 1, 12, 5), 4, 3),
    ((1, 1, 1, 1, 1), 2, 1),
    ((64, 64, 64), 8, 5),
    ((5, 0, 9), 7, 2),
    ((8, 7), 8, 16),
]


def steps_of(batch_size: int, streams: int, dp_rank: int = 0, dp_size: int = 1) -> StepOrder:
    return StepOrder(SampleOrder((1000,), streams, 4, seed=0), batch_size, dp_rank, dp_size)


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    return [
        order.locate(stream, epoch * order.length + i) for stream in range(order.streams) for i in range(order.length)
    ]


@pytest.mark.parametrize("counts, streams, block", LAYOUTS)
def test_an_epoch_visits_each_sample_at_most_once_and_leaves_out_only_the_remainder(counts, streams, block):
    order = SampleOrder(counts, streams, block, seed=1)
    everything = {(s, r) for s, n in enumerate(counts) for r in range(n)}
    for epoch in range(6):
        seen = epoch_of(order, epoch)
        assert len(seen) == len(set(seen)) == sum(counts) // streams * streams
        assert set(seen) <= everything


@pytest.mark.parametrize("counts, streams, block", LAYOUTS)
@pytest.mark.parametrize("first", [0, 1, 4])
def test_any_three_epochs_visit_every_sample(counts, streams, block, first):
    order = SampleOrder(counts, streams, block, seed=2)
    seen = {place for epoch in range(first, first + 3) for place in epoch_of(order, epoch)}
    assert len(seen) == sum(counts)


def test_the_order_is_a_pure_function_whatever_was_asked_before():
    counts, streams, block = (30, 41, 17, 3), 4, 5
    walked = SampleOrder(counts, streams, block, seed=3)
    expected = {(s, i): walked.locate(s, i) for s in range(streams) for i in range(5 * walked.length)}
    rng = np.random.default_rng(0)
    jumping = SampleOrder(counts, streams, block, seed=3)
    for stream, index in rng.permutation(list(expected)).tolist():  # epochs and blocks in any order
        assert jumping.locate(stream, index) == expected[stream, index]
    resumed = pickle.loads(pickle.dumps(walked))
    assert resumed.locate(2, 3 * walked.length + 1) == expected[2, 3 * walked.length + 1]


def test_epochs_seeds_and_streams_differ():
    order, other = SampleOrder((50, 50), 2, 50, seed=0), SampleOrder((50, 50), 2, 50, seed=1)
    first = epoch_of(order, 0)
    assert first != epoch_of(order, 1)
    assert first != epoch_of(other, 0)
    assert [row % 50 for _, row in first[:50]] != [row % 50 for _, row in first[50:]]


def test_samples_stay_within_their_block_so_that_reads_are_nearly_sequential():
    order = SampleOrder((1000,), 2, 10, seed=0)
    rows = np.array([order.locate(0, i)[1] for i in range(500)])
    assert (rows // 10 == np.arange(500) // 10).all()
    assert (rows != np.arange(500)).mean() > 0.5


def test_memory_stays_small_over_a_long_walk():
    order = SampleOrder((100, 100), 4, 7, seed=0)
    for index in range(0, 50_000, 13):
        order.locate(index % 4, index)
    assert order._permutation.cache_info().currsize <= 8 and order._epoch.cache_info().currsize <= 4


def test_more_streams_than_samples_is_refused_by_name():
    for counts in [(3,), (), (0, 0)]:
        with pytest.raises(UserError, match="data.streams=4"):
            SampleOrder(counts, 4, 8, seed=0)
    with pytest.raises(UserError, match="data.shuffle_block"):
        SampleOrder((9,), 4, 0, seed=0)


@pytest.mark.parametrize("dp", [1, 2, 4, 8])
def test_ranks_together_serve_the_positions_of_one_process(dp):
    parts = [steps_of(24, 8, rank, dp) for rank in range(dp)]
    np.testing.assert_array_equal(np.concatenate([part.positions for part in parts]), np.arange(24))
    sources = [part.source(5, position) for part in parts for position in part.positions.tolist()]
    assert sources == [(position // 3, 15 + position % 3) for position in range(24)]


def test_steps_walk_every_stream_without_gap():
    order = steps_of(12, 4)
    sources = [order.source(step, position) for step in range(5) for position in order.positions.tolist()]
    for stream in range(4):
        assert [index for other, index in sources if other == stream] == list(range(15))


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_a_subset_takes_the_same_number_of_every_stream_and_does_not_depend_on_the_layout(dp):
    whole = steps_of(32, 4).subset(3, "ssl", 12)
    assert len(whole) == 12 and (np.diff(whole) > 0).all()
    assert (np.bincount(whole // 8) == 3).all()
    share = 32 // dp
    parts = [steps_of(32, 4, rank, dp).subset(3, "ssl", 12) + rank * share for rank in range(dp)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_subsets_change_with_step_and_purpose_and_reach_every_position():
    order = steps_of(32, 4)
    rows = [tuple(order.subset(step, purpose, 8)) for step in range(40) for purpose in ("ssl", "rec")]
    assert len(set(rows)) > 75
    hits = np.bincount(np.concatenate(rows), minlength=32)
    assert hits.min() > 5 and hits.max() < 40  # 20 expected


def test_a_whole_batch_as_subset():
    np.testing.assert_array_equal(steps_of(16, 4).subset(0, "rec", 16), np.arange(16))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: steps_of(10, 4), ["train.batch_size=10", "data.streams=4"]),
        (lambda: steps_of(8, 4, 0, 3), ["data.streams=4", "data-parallel size 3"]),
        (lambda: steps_of(16, 4).subset(0, "ssl", 6), ["ssl batch=6", "data.streams=4"]),
        (lambda: steps_of(16, 4).subset(0, "rec", 32), ["rec batch=32", "train.batch_size=16"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words)
