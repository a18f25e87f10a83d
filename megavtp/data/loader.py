"""The training loader, which delivers steps in order from worker processes, and the evaluation set.

The loader limits the number of broken samples, and does not hang when a worker dies or hangs.
"""

import atexit
import errno
import logging
import multiprocessing
import multiprocessing.queues
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megavtp.data.augment import center_crop
from megavtp.data.captions import CaptionTokenizer
from megavtp.data.decode import BadSample, decode_image
from megavtp.data.handover import LoadedBatch, cannot_hand_over
from megavtp.data.order import locate
from megavtp.data.picture_memory import PictureMemory
from megavtp.data.shards import RawSample, ShardDataset
from megavtp.data.workers import serve_parent
from megavtp.errors import UserError

logger = logging.getLogger(__name__)

# Workers touch no device, so forking is safe even after CUDA has started here; with one torch thread each they never
# enter a thread pool whose threads did not survive the fork. They start in milliseconds, where spawn and forkserver
# import torch again for seconds. Outside Linux fork itself is not safe.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_LOOK = 0.5  # seconds between two looks at the workers while a batch is awaited
_PATIENCE = 0.9  # share of parallel.timeout for a batch: the loader, which can name the worker, precedes the watchdog
_FIRST = 3  # the first batch, for which files are opened, may take so many times longer
_CLOSING = 5.0  # seconds within which all workers together must end
_WHY = {  # exit status of a worker -> the reason and the remedy
    errno.ENOSPC: "/dev/shm, through which it hands over batches, is full: give the job more shared memory (in a "
    "container --shm-size), lower data.prefetch or data.workers, or set data.workers=0",
    -signal.SIGKILL: "it was killed, most likely for lack of memory: lower data.workers or data.prefetch, or give the "
    "job more memory",
}
_WHY[-signal.SIGBUS] = _WHY[errno.ENOSPC]  # the page that it wrote to could not be had

# Loaders that are still open are closed at exit: multiprocessing would wait for ever for workers that nobody told to
# end. This module's handler is registered after torch's, and so runs before it.
_open_loaders: weakref.WeakSet["Loader"] = weakref.WeakSet()


B = TypeVar("B", bound=LoadedBatch)
B_co = TypeVar("B_co", bound=LoadedBatch, covariant=True)


class StepSource(Protocol[B_co]):
    """What a loader reads: the batch of any step."""

    def __getitem__(self, step: int, /) -> B_co: ...


class Loader(Iterator[B]):
    """Iterates the batches of the steps ``start_step`` .. ``stop_step - 1``, in order, once.

    Args:
        workers: processes that prepare steps, ``prefetch`` ahead each; 0 = this process does.
        max_bad_samples: how many different samples may be broken.
        timeout: seconds that a step may take (parallel.timeout); 0 = no limit.
        pin: whether batches lie in page-locked memory; only where CUDA is available.
        picture_bytes: size of the pictures of a batch, which workers make by ``new_pictures``; 0 = unknown.

    Raises ``UserError`` when more samples are broken, a worker dies, or one takes too long for a batch.
    """

    def __init__(
        self, source: StepSource[B], start_step: int, stop_step: int, *, workers: int = 0, prefetch: int = 2,
        max_bad_samples: int = 1000, timeout: float = 0, pin: bool = False, picture_bytes: int = 0,
    ):
        workers, prefetch = min(workers, max(0, stop_step - start_step)), max(1, prefetch)
        inherits = workers > 0 and START_METHOD == "fork"  # memory that has no name
        memory = _picture_memory(workers, prefetch, picture_bytes) if inherits and picture_bytes else None
        self._patience = _PATIENCE * timeout or float("inf")
        self._delivered = 0  # batches
        self.max_bad_samples = max_bad_samples
        self.bad_samples: set[str] = set()  # names of the samples found broken so far
        self.wait_seconds = 0.0  # time spent waiting in here for data, in all
        self._loader = DataLoader(
            _Guarded(source, memory), batch_size=None, sampler=range(start_step, stop_step), num_workers=workers,
            prefetch_factor=prefetch if workers else None, timeout=_LOOK if workers else 0,
            multiprocessing_context=START_METHOD if workers else None, worker_init_fn=_start_worker,
            pin_memory=pin and torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: the default would draw from, and so advance, the global generator
        )
        self._steps: Iterator[B | UserError] | None = None
        _open_loaders.add(self)

    def __next__(self) -> B:
        start = time.perf_counter()
        try:
            if self._steps is None:
                self._steps = _start(self._loader)
            batch = self._wait(self._steps)
        finally:
            self.wait_seconds += time.perf_counter() - start
        self._delivered += 1
        if isinstance(batch, UserError):
            raise batch
        for entry in batch.bad:
            name = entry.partition(": ")[0]
            if name in self.bad_samples:
                continue  # met again in a later epoch
            self.bad_samples.add(name)
            logger.warning("bad sample replaced: %s", entry)
            if len(self.bad_samples) > self.max_bad_samples:
                raise UserError(
                    f"{len(self.bad_samples)} bad samples, last: {entry}; list them with `python tools/prepare_data.py "
                    f"check FOLDER`, or raise data.max_bad_samples={self.max_bad_samples}"
                )
        return batch

    def _wait(self, steps: Iterator[B | UserError]) -> B | UserError:
        patience = self._patience * (1 if self._delivered else _FIRST)
        start = time.monotonic()
        while True:
            try:
                return next(steps)
            except RuntimeError as error:
                if "DataLoader worker (pid" in str(error):
                    number = next(number for number, worker in enumerate(self._workers) if not worker.is_alive())
                    status = self._workers[number].exitcode
                    why = _WHY.get(status, f"exit status {status}, its last words are above")
                    raise UserError(f"data worker {number} (pid {self._workers[number].pid}) ended: {why}") from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            pinning = getattr(steps, "_pin_memory_thread", None)
            if pinning is not None and not pinning.is_alive():  # torch does not look where it is given a timeout
                raise UserError(
                    "the thread that copies batches to page-locked memory ended, its last words are above; too many "
                    "open files (ulimit -n) and too little memory are the usual reasons"
                )
            if (waited := time.monotonic() - start) > patience:
                number = self._delivered % len(self._workers)  # they take turns
                raise UserError(
                    f"data worker {number} (pid {self._workers[number].pid}) hangs: its batch has not come for "
                    f"{waited:.0f} s; look at the storage it reads from; a run's limit is parallel.timeout"
                )

    @property
    def _workers(self) -> list[Any]:
        """The processes of torch's iterator; none if it prepares the batches in this process."""
        return getattr(self._steps, "_workers", [])

    def close(self) -> None:
        """Stop the workers. The loader cannot go on afterwards."""
        steps: Any = self._steps
        workers = self._workers
        self._steps = iter(())
        deadline = time.monotonic() + _CLOSING
        for worker in workers:  # torch would give each one that hangs ten seconds, one after the other
            worker.join = partial(_join_or_kill, worker, deadline)
        if workers:
            # not left to the garbage collector: an exception's traceback may keep the iterator alive for long
            steps._shutdown_workers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@atexit.register
def _close_all() -> None:
    for loader in list(_open_loaders):
        loader.close()


class _Guarded(torch.utils.data.Dataset):
    """Hands a user error over as a value: torch would wrap a worker's exception in a page of traceback."""

    def __init__(self, source: StepSource, memory: PictureMemory | None):
        self.source, self.memory = source, memory

    def __getitem__(self, step: int) -> LoadedBatch | UserError:
        try:
            return self.source[step]
        except UserError as error:
            return error


def _picture_memory(workers: int, prefetch: int, size: int) -> PictureMemory | None:
    try:
        # A worker has ``prefetch`` batches in work or waiting, and whoever iterates holds one or two.
        return PictureMemory(workers, prefetch + 2, size)
    except OSError as error:
        logger.warning("data workers take new shared memory for each batch, as none can be set aside: %s", error)
        return None


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start the workers, and undo torch's SIGCHLD handler, which would raise in the midst of whatever this process does
    when a worker dies. The iterator notices that by itself within seconds, in a place where the user can be told."""
    handler = signal.getsignal(signal.SIGCHLD)
    steps = iter(loader)
    if threading.current_thread() is threading.main_thread():  # torch sets its handler nowhere else
        signal.signal(signal.SIGCHLD, handler)
    return steps


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's signals reach the whole process group. The trainer decides what they mean: it may
    # write a checkpoint first.
    serve_parent((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    # A batch that cannot be handed over would be lost, and awaited for ever.
    queue: Any = multiprocessing.queues.Queue  # whose handler its type stubs lack
    queue._on_queue_feeder_error = staticmethod(partial(cannot_hand_over, worker))


def _join_or_kill(worker: multiprocessing.Process, deadline: float, timeout: float | None = None) -> None:
    """``worker.join``, for a worker that may be stuck in a read, and is deaf to SIGTERM (see ``_start_worker``)."""
    type(worker).join(worker, max(0.0, deadline - time.monotonic()))
    if worker.is_alive():
        worker.kill()
        type(worker).join(worker, 1.0)  # a read that cannot be interrupted keeps it until it returns


class CroppedSamples:
    """The samples of a data set, numbered through all shards, with their images reduced and cut to the middle ``size``
    pixels, as in the reconstruction protocol."""

    def __init__(self, dataset: ShardDataset, size: int, max_pixels: int):
        self.dataset, self.size, self.max_pixels = dataset, size, max_pixels
        self._ends = np.cumsum(dataset.shard_counts)

    def read(self, number: int) -> tuple[RawSample, Tensor]:
        """Return a sample and its image, uint8 (3, size, size). ``BadSample``, with its name, if it is broken."""
        shard, row = locate(self._ends, number)
        try:
            raw = self.dataset.read(shard, row)
            return raw, center_crop(decode_image(raw.image, self.max_pixels), self.size)
        except BadSample as error:
            raise BadSample(f"{self.dataset.name(shard, row)}: {error}") from None


class EvalDataset(CroppedSamples):
    """At most ``max_samples`` samples, spread evenly over the data set, in its order; nothing is random."""

    def __init__(
        self, dataset: ShardDataset, tokenizer: CaptionTokenizer, size: int, max_samples: int, max_pixels: int
    ):
        super().__init__(dataset, size, max_pixels)
        self.tokenizer = tokenizer
        self._total = len(dataset)
        self._count = min(self._total, max_samples)

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """Yield the samples rank, rank + world, ... as dicts of index (b,), image uint8 (b, 3, size, size), tokens
        (b, T), caption list[str], meta list[dict]. A broken sample is left out and named in the log."""
        rows = self._rows(range(rank, self._count, world))
        while batch := tuple(islice(rows, batch_size)):
            indices, raws, images = zip(*batch, strict=True)
            captions = [raw.caption for raw in raws]
            yield {
                "index": torch.tensor(indices), "image": torch.stack(images), "tokens": self.tokenizer.encode(captions),
                "caption": captions, "meta": [raw.meta for raw in raws],
            }

    def metadata(self, indices: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Read the metadata of these samples, or of all, without their images; that of a broken sample is empty."""
        found: list[dict[str, Any]] = []
        for index in range(self._count) if indices is None else indices:
            try:
                found.append(self.dataset.meta(*locate(self._ends, self._number(index))))
            except BadSample:
                found.append({})
        return found

    def _number(self, index: int) -> int:
        return index * self._total // self._count

    def _rows(self, indices: range) -> Iterator[tuple[int, RawSample, Tensor]]:
        for index in indices:
            try:
                yield index, *self.read(self._number(index))
            except BadSample as error:
                logger.warning("bad sample left out of the evaluation: %s", error)
