"""Ways to do the same work take turns in one process: a machine that becomes slower is slower for all of them."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Way = Callable[[], object]
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, as torch does on a GPU, where its C library is glibc.

    Otherwise a large tensor is new memory each time. Its page faults take as long as a pass over it, and which way's
    turn has them depends on what ran before in the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def alternate(
    ways: Mapping[str, Way], rounds: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, until the device has done it. An untimed round goes before."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            _finish(device)
            start = clock()
            way()
            _finish(device)
            if number:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Sequence[float], to: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of the rounds' ratios ``seconds / to``, with the median in the middle."""
    each = [a / b for a, b in zip(seconds, to, strict=True)]
    low, median, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return low, median, high


def peak_bytes(way: Way, device: torch.device) -> int:
    """Return the most bytes that torch has allocated for ``way`` at one time."""
    gc.collect()  # what earlier work has left behind is not to be freed in the middle
    if device.type == "cuda":
        _finish(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        way()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of two tensors of a pair, as a part of the largest value in the second; or NaN."""
    errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(found, wanted, strict=True)]
    return float(torch.stack(errors).max())  # Python's max would overlook a NaN


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
