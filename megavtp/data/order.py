"""The order of samples: pure functions from (stream, index) to (shard, row), and from a step to its positions.

The data set of N samples is cut into S streams. In each epoch the shards are permuted, laid end to end, and cut into
S runs of L = N // S samples; a stream reads its run through permutations of ``shuffle_block`` neighbours, so a tar
file is read almost front to back while the order is still random. Ranks play no part: a rank merely serves streams.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from megavtp.arithmetic import ceil_div
from megavtp.data.decode import BadSample
from megavtp.data.randomness import generator, stable_hash
from megavtp.errors import UserError

REPLACEMENTS = 10  # candidates tried for a broken sample
Sample = TypeVar("Sample")


def cumulated(counts: Iterable[int]) -> np.ndarray:
    """Return where each run of samples ends when they are laid end to end."""
    return np.cumsum(np.asarray(tuple(counts), dtype=np.int64))


def locate(ends: np.ndarray, number: int) -> tuple[int, int]:
    """Return the run that holds the sample ``number``, and its place in that run."""
    run = int(np.searchsorted(ends, number, side="right"))
    return run, number - (int(ends[run - 1]) if run else 0)


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # the permuted shard numbers
    ends: np.ndarray  # cumulated counts of the kept samples, in that order
    gap_start: np.ndarray  # first row that this epoch leaves out, by shard number
    gap_size: np.ndarray  # how many rows it leaves out from there, by shard number


class NamedSamples(Protocol):
    def name(self, shard: int, row: int) -> str: ...


class SampleOrder:
    """The order of ``sum(shard_counts)`` samples in ``streams`` logical streams.

    Each epoch visits every sample at most once and leaves out N mod S of them. The left-out window moves on with the
    epoch, so a sample is visited at least once in any three epochs in a row.
    """

    def __init__(self, shard_counts: Sequence[int], streams: int, shuffle_block: int, seed: int):
        if streams < 1 or shuffle_block < 1:
            raise UserError(f"data.streams={streams} and data.shuffle_block={shuffle_block} must both be at least 1")
        self.counts = np.asarray(shard_counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.streams = streams
        self.block = shuffle_block
        self.seed = seed
        self.length = self.total // streams  # samples of one stream in one epoch
        if self.length == 0:
            raise UserError(
                f"data.streams={streams} is more than the {self.total} samples of the data set: "
                "lower data.streams or add samples"
            )
        self._epochs: dict[Hashable, _Epoch] = {}
        self._permutations: dict[Hashable, np.ndarray] = {}

    def locate(self, stream: int, index: int) -> tuple[int, int]:
        """Return (shard, row) of the ``index``-th sample (0, 1, ... without end) that ``stream`` delivers."""
        epoch, offset = divmod(index, self.length)
        block, within = divmod(offset, self.block)
        within = self._permutation(epoch, stream, block)[within]
        place = stream * self.length + block * self.block + int(within)  # in the epoch's sequence of all samples
        layout = self._epoch(epoch)
        i, row = locate(layout.ends, place)
        shard = int(layout.shards[i])
        if row >= layout.gap_start[shard]:
            row += int(layout.gap_size[shard])
        return shard, row

    def read(
        self, stream: int, index: int, read: Callable[[int, int], Sample], samples: NamedSamples,
        bad: list[str], remedy: str,
    ) -> Sample:
        """Read the stream's ``index``-th sample by (shard, row), or the first good candidate in its place.

        ``bad`` gets "name: reason" of each broken one. UserError, with ``remedy``, if all candidates are broken.
        """
        at = index
        for attempt in range(1, REPLACEMENTS + 2):
            shard, row = self.locate(stream, at)
            try:
                return read(shard, row)
            except BadSample as error:
                bad.append(f"{samples.name(shard, row)}: {error}")
            # anywhere in the stream's next L samples: neighbours in a damaged file would likely be broken too
            at = index + 1 + stable_hash(self.seed, "replace", stream, index, attempt) % self.length
        raise UserError(
            f"{REPLACEMENTS + 1} samples that stand in for one another are all broken, last: {bad[-1]}; {remedy}"
        )

    def _permutation(self, epoch: int, stream: int, block: int) -> np.ndarray:
        size = min(self.block, self.length - block * self.block)
        draw = lambda: generator(self.seed, "block", epoch, stream, block).permutation(size).astype(np.int32)  # noqa: E731
        # a stream walks block by block, and its next block or epoch may begin within a step
        return _remember(self._permutations, (epoch, stream, block), draw, limit=2 * self.streams)

    def _epoch(self, epoch: int) -> _Epoch:
        return _remember(self._epochs, epoch, lambda: self._lay_out(epoch), limit=4)

    def _lay_out(self, epoch: int) -> _Epoch:
        left_out = self.total - self.streams * self.length  # fewer than half of all samples
        windows = ceil_div(self.total, left_out) if left_out else 1
        start = min(epoch % windows * left_out, self.total - left_out)
        last = np.cumsum(self.counts)
        first = last - self.counts
        gap_start = np.clip(start - first, 0, self.counts)
        gap_size = np.clip(start + left_out - first, 0, self.counts) - gap_start
        shards = generator(self.seed, "shards", epoch).permutation(len(self.counts))
        return _Epoch(shards, np.cumsum((self.counts - gap_size)[shards]), gap_start, gap_size)


def _remember(cache: dict[Hashable, Any], key: Hashable, make: Callable[[], Any], limit: int) -> Any:
    """Return ``cache[key]``, and make it if it is absent; the oldest of more than ``limit`` entries is dropped."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            del cache[next(iter(cache))]
    return cache[key]


@dataclass(frozen=True)
class StepPositions:
    """The samples of one step that one data-parallel rank serves, in the order of their global positions.

    ``positions`` (b,): place in the global batch; ``streams`` (b,) and ``indices`` (b,): where each is read from.
    """

    positions: np.ndarray
    streams: np.ndarray
    indices: np.ndarray


def step_positions(step: int, batch_size: int, streams: int, dp_rank: int = 0, dp_size: int = 1) -> StepPositions:
    """Return the positions of a rank: p = stream * (B/S) + i takes index step * (B/S) + i of its stream.

    Rank r of dp serves the streams [r S/dp, (r+1) S/dp), which is a contiguous run of positions.
    """
    each, served = _shares(batch_size, "train.batch_size", streams, dp_size)
    positions = np.arange(dp_rank * served * each, (dp_rank + 1) * served * each)
    return StepPositions(positions, positions // each, step * each + positions % each)


def step_subset(
    seed: int, step: int, purpose: str, batch_size: int, count: int, streams: int, dp_rank: int = 0, dp_size: int = 1
) -> np.ndarray:
    """Return the rows of this rank's share of the step, ascending, that an objective with a batch of ``count`` takes.

    Every stream's slice gives the same number, so ranks have equal counts on every layout. The draw depends on
    (seed, step, purpose, stream) alone: an objective's subset does not change when another is switched off.
    """
    each, served = _shares(batch_size, "train.batch_size", streams, dp_size)
    take, _ = _shares(count, f"the {purpose} batch", streams, dp_size)
    if take > each:
        raise UserError(f"the {purpose} batch={count} is more than train.batch_size={batch_size}: lower it")
    rows = [
        i * each + np.sort(generator(seed, "subset", purpose, step, dp_rank * served + i).permutation(each)[:take])
        for i in range(served)
    ]
    return np.concatenate(rows)


def _shares(size: int, name: str, streams: int, dp_size: int) -> tuple[int, int]:
    """Return (samples of each stream, streams of each rank). UserError if the sizes do not divide."""
    if streams % dp_size:
        raise UserError(f"data.streams={streams} is not a multiple of the data-parallel size {dp_size}: change either")
    if size < streams or size % streams:
        raise UserError(f"{name}={size} is not a multiple of data.streams={streams}: change either")
    return size // streams, streams // dp_size
