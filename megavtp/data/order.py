"""The order of samples: pure functions from (stream, index) to (shard, row), and from a step to its positions.

The data set of N samples is cut into S streams. In each epoch the shards are permuted, laid end to end, and cut into
S runs of L = N // S samples; a stream reads its run through permutations of ``shuffle_block`` neighbours, so a tar
file is read almost front to back while the order is still random. Ranks play no part: a rank merely serves streams.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from megavtp.arithmetic import ceil_div
from megavtp.data.decode import BadSample
from megavtp.data.randomness import generator, stable_hash
from megavtp.errors import UserError

REPLACEMENTS = 10  # candidates tried for a broken sample
Sample = TypeVar("Sample")


def locate(ends: np.ndarray, number: int) -> tuple[int, int]:
    """Return (shard, row) of the sample ``number`` of shards laid end to end; ``ends`` are their cumulated counts."""
    shard = int(np.searchsorted(ends, number, side="right"))
    return shard, number - (int(ends[shard - 1]) if shard else 0)


class NamedSamples(Protocol):
    def name(self, shard: int, row: int) -> str: ...


class SampleOrder:
    """The order of ``sum(shard_counts)`` samples in ``streams`` streams.

    Each epoch visits every sample at most once and leaves out N mod S of them. The left-out window moves on with the
    epoch, so a sample is visited at least once in any three epochs in a row.
    """

    def __init__(self, shard_counts: Sequence[int], streams: int, shuffle_block: int, seed: int):
        if streams < 1 or shuffle_block < 1:
            raise UserError(f"data.streams={streams} and data.shuffle_block={shuffle_block} must both be at least 1")
        self.counts = np.asarray(shard_counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.streams, self.block, self.seed = streams, shuffle_block, seed
        self.length = self.total // streams  # samples of one stream in one epoch
        if self.length == 0:
            remedy = "lower data.streams or add samples"
            raise UserError(f"data.streams={streams} is more than the {self.total} samples of the data set: {remedy}")
        self._epoch = lru_cache(maxsize=4)(self._lay_out)
        # a stream walks block by block, and its next block or epoch may begin within a step
        self._permutation = lru_cache(maxsize=2 * streams)(self._permute)

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleOrder, (self.counts, self.streams, self.block, self.seed)

    def locate(self, stream: int, index: int) -> tuple[int, int]:
        """Return (shard, row) of the ``index``-th sample (0, 1, ... without end) that ``stream`` delivers."""
        epoch, offset = divmod(index, self.length)
        block, within = divmod(offset, self.block)
        within = self._permutation(epoch, stream, block)[within]
        place = stream * self.length + block * self.block + int(within)  # in the epoch's sequence of all samples
        shards, ends, gap_start, gap_size = self._epoch(epoch)
        i, row = locate(ends, place)
        shard = int(shards[i])
        return shard, row + int(gap_size[shard]) if row >= gap_start[shard] else row

    def _permute(self, epoch: int, stream: int, block: int) -> np.ndarray:
        size = min(self.block, self.length - block * self.block)
        return generator(self.seed, "block", epoch, stream, block).permutation(size).astype(np.int32)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, ...]:
        """Return the permuted shard numbers and the cumulated counts of what the epoch keeps of these shards; and, by
        shard number, the first row that it leaves out and how many it leaves out from there."""
        left_out = self.total - self.streams * self.length  # fewer than half of all samples
        windows = ceil_div(self.total, left_out) if left_out else 1
        start = min(epoch % windows * left_out, self.total - left_out)
        last = np.cumsum(self.counts)
        first = last - self.counts
        gap_start = np.clip(start - first, 0, self.counts)
        gap_size = np.clip(start + left_out - first, 0, self.counts) - gap_start
        shards = generator(self.seed, "shards", epoch).permutation(len(self.counts))
        return shards, np.cumsum((self.counts - gap_size)[shards]), gap_start, gap_size


class StepOrder:
    """The samples of each step that data-parallel rank ``dp_rank`` of ``dp_size`` reads.

    Position p = stream * (B/S) + i of a step takes index step * (B/S) + i of its stream. Rank r of dp serves the
    streams [r S/dp, (r+1) S/dp), so its ``positions`` (b,) are a contiguous run. UserError if sizes do not divide.
    """

    def __init__(self, order: SampleOrder, batch_size: int, dp_rank: int = 0, dp_size: int = 1):
        self.order, self.batch_size = order, batch_size
        if order.streams % dp_size:
            raise UserError(
                f"data.streams={order.streams} is not a multiple of the data-parallel size {dp_size}: change either"
            )
        self.each = self._per_stream(batch_size, "train.batch_size")
        served = order.streams // dp_size
        self.streams = range(dp_rank * served, (dp_rank + 1) * served)
        self.positions = np.arange(self.streams.start * self.each, self.streams.stop * self.each)

    def source(self, step: int, position: int) -> tuple[int, int]:
        """Return (stream, index) of the sample at ``position`` in the global batch."""
        stream, i = divmod(position, self.each)
        return stream, step * self.each + i

    def subset(self, step: int, purpose: str, count: int) -> np.ndarray:
        """Return the rows (v,) of this rank's share, ascending, that an objective with a batch of ``count`` takes.

        Every stream's slice gives the same number, so ranks have equal counts on every layout. The draw depends on
        (seed, step, purpose, stream) alone: an objective's subset does not change when another is switched off.
        """
        take = self._per_stream(count, f"the {purpose} batch")
        if take > self.each:
            raise UserError(f"the {purpose} batch={count} is more than train.batch_size={self.batch_size}: lower it")
        draws = (generator(self.order.seed, "subset", purpose, step, stream) for stream in self.streams)
        rows = [i * self.each + np.sort(draw.permutation(self.each)[:take]) for i, draw in enumerate(draws)]
        return np.concatenate(rows)

    def read(
        self, step: int, position: int, read: Callable[[int, int], Sample], samples: NamedSamples, bad: list[str],
        remedy: str,
    ) -> Sample:
        """Read the sample at ``position`` by (shard, row), or the first good candidate in its place. ``bad`` gets
        "name: reason" of each broken one. UserError, with ``remedy``, if all candidates are broken."""
        stream, index = self.source(step, position)
        at = index
        for attempt in range(1, REPLACEMENTS + 2):
            shard, row = self.order.locate(stream, at)
            try:
                return read(shard, row)
            except BadSample as error:
                bad.append(f"{samples.name(shard, row)}: {error}")
            # anywhere in the stream's next L samples: neighbours in a damaged file would likely be broken too
            at = index + 1 + stable_hash(self.order.seed, "replace", stream, index, attempt) % self.order.length
        raise UserError(
            f"{REPLACEMENTS + 1} samples that stand in for one another are all broken, last: {bad[-1]}; {remedy}"
        )

    def _per_stream(self, size: int, name: str) -> int:
        if size < self.order.streams or size % self.order.streams:
            raise UserError(f"{name}={size} is not a multiple of data.streams={self.order.streams}: change either")
        return size // self.order.streams
