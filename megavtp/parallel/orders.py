"""The order in which each pipeline rank runs its forwards and backwards: GPipe, 1F1B, interleaved 1F1B.

Letters: p pipeline ranks, V chunks of the pass on each rank (virtual stages times legs), m micro-batches. Chunk k of
rank r is stage k p + r of the pass.

Sources: GPipe arXiv 1811.06965; 1F1B arXiv 2006.09503; interleaved 1F1B arXiv 2104.04473. The tables equal those of
torch.distributed.pipelining where it has one (``tests/parallel/test_orders.py``); here m may be any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b"]


class Op(NamedTuple):
    """The forward ("F") or backward ("B") of one stage of the pass on one micro-batch."""

    kind: Literal["F", "B"]
    stage: int
    micro: int


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
    done: dict[Op, float] = {}
    clocks, positions = [0.0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while positions[rank] < len(order):
                op = order[positions[rank]]
                needs = _needs(op, stages)
                if needs is not None and needs not in done:
                    break
                start = clocks[rank] if needs is None else max(clocks[rank], done[needs])
                clocks[rank] = done[op] = start + (forward if op.kind == "F" else backward)
                positions[rank] += 1
                moved = True
    if any(position < len(order) for position, order in zip(positions, orders)):
        raise ValueError("the orders of the ranks wait for each other")
    return clocks


def _needs(op: Op, stages: int) -> Op | None:
    if op.kind == "F":
        return None if op.stage == 0 else Op("F", op.stage - 1, op.micro)
    return Op("F", op.stage, op.micro) if op.stage == stages - 1 else Op("B", op.stage + 1, op.micro)


def bubble(schedule: Schedule, p: int, V: int, m: int) -> float:
    """Return a rank's idle time over its busy time in a training pass: (p - 1) / (V m) where p divides m or V is 1."""
    busy = 3.0 * V * m
    clocks = simulate([train_order(schedule, p, rank, V, m) for rank in range(p)], V * p)
    return max(clocks) / busy - 1
