"""How fast ranks exchange data, all together and two by two."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megavtp.launch import phase
from megavtp.parallel.collectives import all_gather_object

_REPEATS = 3  # the fastest counts; a round before that opens the connections


@dataclass(frozen=True)
class Link:
    """Two ranks and the bytes per second each sends to the other, while the other does the same."""

    first: int
    second: int
    bytes_per_second: float


def all_reduce_seconds(size: int, device: torch.device) -> float:
    """Measure one all-reduce of ``size`` bytes over all ranks, in seconds; every rank must call this."""
    buffer = torch.zeros(size // 4, device=device)
    phase.enter(f"all-reduce of {size >> 20} MiB over all ranks")
    return _fastest(lambda: dist.all_reduce(buffer), device)


def links(pairs: Sequence[Sequence[tuple[int, int]]], size: int, device: torch.device) -> list[Link]:
    """Measure pairs of ranks, in rounds in which no rank is in two pairs; return all links, on all ranks."""
    rank = dist.get_rank()
    own = []
    give, take = torch.zeros(size // 4, device=device), torch.empty(size // 4, device=device)
    for number, round_ in enumerate(pairs):
        partner = next((b if rank == a else a for a, b in round_ if rank in (a, b)), None)
        phase.enter(f"exchange round {number + 1} of {len(pairs)}" + ("" if partner is None else f", with {partner}"))
        if partner is not None:
            seconds = _fastest(partial(_exchange, give, take, partner), device)
            if rank < partner:
                own.append(Link(rank, partner, size / seconds))
        dist.barrier()
    return [link for links_there in all_gather_object(own) for link in links_there]


def _exchange(give: torch.Tensor, take: torch.Tensor, partner: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, give, partner), dist.P2POp(dist.irecv, take, partner)]):
        work.wait()


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return every pair of ``ranks`` once, in rounds in which each rank is in at most one pair (circle method)."""
    ring: list[int | None] = list(ranks) + [None] * (len(ranks) % 2)
    half, found = len(ring) // 2, []
    for _ in range(len(ring) - 1):
        pairs = zip(ring[:half], reversed(ring[half:]))
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return [round_ for round_ in found if round_]


def slow_links(found: Sequence[Link]) -> list[Link]:
    """Return the links with less than a third of the median speed, if there are at least three to compare."""
    if len(found) < 3:
        return []
    median = statistics.median(link.bytes_per_second for link in found)
    return [link for link in found if link.bytes_per_second < median / 3]
