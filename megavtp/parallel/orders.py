"""The order in which each pipeline rank runs its forwards and backwards: GPipe, 1F1B, interleaved 1F1B.

Letters: p pipeline ranks, V chunks of the pass on each rank (virtual stages times legs), m micro-batches. Chunk k of
rank r is stage k p + r of the pass.

Sources: GPipe arXiv 1811.06965; 1F1B arXiv 2006.09503; interleaved 1F1B arXiv 2104.04473. The tables equal those of
torch.distributed.pipelining where it has one (``tests/parallel/test_orders.py``); here m may be any number.
"""

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Literal, NamedTuple

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b"]


class Op(NamedTuple):
    """The forward ("F") or backward ("B") of one stage of the pass on one micro-batch."""

    kind: Literal["F", "B"]
    stage: int
    micro: int

    def along(self, hops: int, stages: int) -> "Op | None":
        """Return the same operation ``hops`` stages on, which for a backward is down; None past an end of the pass."""
        stage = self.stage + (hops if self.kind == "F" else -hops)
        return self._replace(stage=stage) if 0 <= stage < stages else None


def forward_order(p: int, rank: int, V: int, m: int) -> list[Op]:
    """Order the forwards of a pass without gradient: all chunks of p micro-batches, then those of the next p."""
    return [Op("F", chunk * p + rank, micro) for chunk, micro in _rounds(p, V, m)]


def train_order(schedule: Schedule, p: int, rank: int, V: int, m: int) -> list[Op]:
    """Order all forwards and backwards of one rank.

    ``gpipe``: every forward first, chunk by chunk, then every backward; the graphs of all m are held. ``1f1b`` and
    ``interleaved_1f1b``: as few forwards as fill the pipeline, then one backward after each forward; the two differ
    in how many chunks a tower has, not in the rule, and with V > 1 the rule is the interleaved one.
    """
    if schedule == "gpipe":
        stages = [chunk * p + rank for chunk in range(V)]
        forwards = [Op("F", stage, micro) for stage in stages for micro in range(m)]
        return forwards + [Op("B", stage, micro) for stage in reversed(stages) for micro in range(m)]
    forwards = forward_order(p, rank, V, m)
    backwards = [Op("B", (V - 1 - chunk) * p + rank, micro) for chunk, micro in _rounds(p, V, m)]
    # A rank is `p - 1 - rank` hops from the last. A micro-batch that has to come round again needs two forwards a hop.
    fill = p - 1 - rank if V == 1 else (V - 1) * _round_sizes(p, m)[0] + 2 * (p - 1 - rank)
    fill = min(fill, V * m)
    steady = [op for pair in zip(forwards[fill:], backwards) for op in pair]
    return forwards[:fill] + steady + backwards[V * m - fill :]


def one_by_one(order: Sequence[Op]) -> list[Op]:
    """Return a rank's operations with each micro-batch going through the whole pass before the next one.

    Only one rank works at a time. So none is waited for by another while it waits for its own device.
    """
    return sorted(order, key=lambda op: (op.micro, op.kind == "B", op.stage if op.kind == "F" else -op.stage))


def _round_sizes(p: int, m: int) -> list[int]:
    """Deal the micro-batches in rounds of p, or a few more where p does not divide m, the larger rounds first."""
    rounds = max(1, m // p)
    return [m // rounds + (index < m % rounds) for index in range(rounds)]


def _rounds(p: int, V: int, m: int) -> list[tuple[int, int]]:
    """Return (chunk, micro-batch) in the order of depth-first forwards."""
    order, start = [], 0
    for size in _round_sizes(p, m):
        order += [(chunk, micro) for chunk in range(V) for micro in range(start, start + size)]
        start += size
    return order


def simulate(orders: Sequence[Sequence[Op]], stages: int, forward: float = 1.0, backward: float = 2.0) -> list[float]:
    """Return when each rank is done, if a chunk's forward and backward take these times and a message takes none.

    Every operation waits for what it needs: a forward for the stage before, a backward for the stage after it and, on
    the last stage, for its own forward. ValueError if the orders wait for each other for ever.
    """
    before: dict[Op, list[Op]] = {}
    for order in orders:
        for own, op in zip([None, *order], order):
            need = op.along(-1, stages)
            if need is None and op.kind == "B":
                need = Op("F", op.stage, op.micro)
            before[op] = [x for x in (own, need) if x is not None]
    done: dict[Op, float] = {}
    try:
        for op in TopologicalSorter(before).static_order():
            start = max((done[x] for x in before[op]), default=0.0)
            done[op] = start + (forward if op.kind == "F" else backward)
    except CycleError:
        raise ValueError("the orders of the ranks wait for each other") from None
    return [done[order[-1]] for order in orders]


def bubble(schedule: Schedule, p: int, V: int, m: int) -> float:
    """Return a rank's idle time over its busy time in a training pass: (p - 1) / (V m) where p divides m or V is 1."""
    clocks = simulate([train_order(schedule, p, rank, V, m) for rank in range(p)], V * p)
    return max(clocks) / (3.0 * V * m) - 1
