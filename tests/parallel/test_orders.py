"""The tables of operations: torch's own where it has one, free of deadlock, with the theoretical bubble."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from graphlib import CycleError, TopologicalSorter
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS

from megavtp.parallel.orders import Op, bubble, forward_order, one_by_one, simulate, train_order

RANKS, MICRO_BATCHES = (1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 7, 8, 16)


def ops_of(actions: list) -> list[Op]:
    """Torch's actions, without its pauses and reductions, as ours."""
    return [
        Op(a.computation_type.value, a.stage_index, a.microbatch_index)
        for a in actions if a is not None and a.computation_type.value in "FB"
    ]


def torch_order(schedule: str, p: int, rank: int, V: int, m: int) -> list[Op]:
    """The order of torch.distributed.pipelining, from the methods that make its tables; they read no more than this."""
    place = SimpleNamespace(
        pp_group_size=p, n_local_stages=V, _stages=[None] * V, _n_microbatches=m, _num_stages=p,
        microbatches_per_round=m // max(1, m // p),
    )
    if V == 1:
        return ops_of({"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule]._get_pipeline_order(place)[rank])
    classes = {"gpipe": ScheduleLoopedBFS, "1f1b": ScheduleInterleaved1F1B}
    return ops_of(classes[schedule]._calculate_single_rank_operations(place, rank))


@pytest.mark.parametrize("V", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_orders_are_torchs(schedule: str, V: int) -> None:
    compared = 0
    for p in RANKS[1:]:
        for m in MICRO_BATCHES:
            if (m < p and schedule == "1f1b" and V == 1) or (V > 1 and m % max(1, m // p)):
                continue  # torch refuses these
            for rank in range(p):
                ours, theirs = train_order(schedule, p, rank, V, m), torch_order(schedule, p, rank, V, m)
                if schedule == "gpipe" and V > 1:  # there, torch goes back through the micro-batches the other way
                    half = V * m
                    theirs[half:] = [Op(kind, stage, m - 1 - micro) for kind, stage, micro in theirs[half:]]
                if schedule == "1f1b" and V == 1 and rank == p - 1:  # torch's table counts these forwards from 1
                    theirs = [Op(k, s, micro - (k == "F")) for k, s, micro in theirs]
                assert ours == theirs, (p, m, rank)
                compared += 1
    assert compared > 50


@pytest.mark.parametrize("V", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_no_deadlock_and_the_bubble_of_theory(schedule: str, V: int) -> None:
    """For every number of micro-batches, also those that p does not divide. (p - 1) / (V m) where the theory holds."""
    for p in RANKS:
        for m in MICRO_BATCHES:
            idle = bubble(schedule, p, V, m)
            if V == 1 or m % p == 0:
                assert idle == pytest.approx((p - 1) / (V * m), abs=1e-12), (p, m)
            else:
                assert (p - 1) / (V * m) <= idle + 1e-12 <= (p - 1) / m + 1e-12, (p, m)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("V", [1, 2])
def test_memory_of_the_schedules(p: int, V: int) -> None:
    """Graphs held at a time: all under GPipe, under 1F1B a number that does not grow with the micro-batches."""

    def held(schedule: str, rank: int, m: int) -> int:
        depth = most = 0
        for op in train_order(schedule, p, rank, V, m):
            depth += 1 if op.kind == "F" else -1
            most = max(most, depth)
        assert depth == 0
        return most

    for rank in range(p):
        assert held("gpipe", rank, 16) == 16 * V
        assert held("1f1b", rank, 16) == held("1f1b", rank, 64) <= (p - rank if V == 1 else (V - 1) * p + 2 * p)


def test_forwards_alone_take_no_longer_than_needed() -> None:
    for p in RANKS:
        for m in MICRO_BATCHES:
            for V in (1, 2):
                done = max(simulate([forward_order(p, rank, V, m) for rank in range(p)], V * p))
                assert done == V * m + p - 1 or m % p
                assert done <= V * (m + p - 1)


def test_orders_that_wait_for_each_other_are_told() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[Op("B", 0, 0), Op("F", 0, 0)], [Op("F", 1, 0), Op("B", 1, 0)]], 2)


def waits_for_ever(orders: list[list[Op]], stages: int, ahead: bool) -> bool:
    """Whether ranks hang whose hosts wait for their device in the midst of every operation.

    The device is done when what it was told to receive has been sent, and what it was told to send is being received.
    """
    place = {op: (rank, number) for rank, order in enumerate(orders) for number, op in enumerate(order)}
    after: dict[tuple[str, int, int], set[tuple[str, int, int]]] = {}
    for rank, number in place.values():
        before = {("end", rank, number - 1)} if number else set()
        after["begin", rank, number] = before
        needs = [orders[rank][n] for n in range(number + 1 + (ahead and number + 1 < len(orders[rank])))]
        received = [("end", *place[sender]) for need in needs if (sender := need.along(-1, stages)) in place]
        asked = []
        for earlier in orders[rank][:number]:
            if (target := earlier.along(1, stages)) in place:
                other, at = place[target]
                asked.append(("begin", other, max(0, at - ahead)))
        after["end", rank, number] = {("begin", rank, number), *received, *asked}
    try:
        list(TopologicalSorter(after).static_order())
    except CycleError:
        return True
    return False


@pytest.mark.parametrize("order_of", [partial(train_order, "1f1b"), partial(train_order, "gpipe"), forward_order])
def test_hosts_that_wait_do_not_hang_one_by_one(order_of: Callable[[int, int, int, int], list[Op]]) -> None:
    hung = 0
    for p in (2, 3, 4):
        for V in (1, 2, 3):
            for m in (1, 2, 3, 4, 6):
                orders = [order_of(p, rank, V, m) for rank in range(p)]
                alone = [one_by_one(order) for order in orders]
                assert [sorted(order) for order in alone] == [sorted(order) for order in orders]
                assert not waits_for_ever(alone, V * p, ahead=False), (p, V, m)
                hung += waits_for_ever(orders, V * p, ahead=True)
    assert hung, "the schedules could be used as they are"
