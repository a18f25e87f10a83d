"""What reads a data set: the training loader (steps in order from worker processes, with a limit on broken samples and
no hang when a worker dies or hangs) and the evaluation set."""

from __future__ import annotations

import atexit
import errno
import logging
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader

from megavtp.data.augment import center_crop
from megavtp.data.batch import Batch, StepDataset
from megavtp.data.captions import CaptionTokenizer
from megavtp.data.decode import BadSample, decode_image
from megavtp.data.shards import RawSample, ShardDataset
from megavtp.data.workers import serve_parent
from megavtp.errors import UserError

logger = logging.getLogger(__name__)

# Workers decode and augment on the CPU and touch no device, so forking is safe even after CUDA has started here; with
# one torch thread each they never enter a thread pool whose threads did not survive the fork. They start in
# milliseconds, where spawn and forkserver import torch again for seconds. Outside Linux fork itself is not safe.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_LOOK = 0.5  # seconds between two looks at the workers while a batch is awaited
# Share of parallel.timeout that a worker has for a batch: the loader, which can name it, speaks before the watchdog.
_PATIENCE = 0.9
_FIRST = 3  # times that for the first batch, for which files are opened
_CLOSING = 5.0  # seconds that all workers together have to end
_WHY = {  # exit status of a worker -> the reason and the remedy
    errno.ENOSPC: "/dev/shm, through which it hands over batches, is full: give the job more shared memory (in a "
    "container --shm-size), lower data.prefetch or data.workers, or set data.workers=0",
    -signal.SIGKILL: "it was killed, most likely for lack of memory: lower data.workers or data.prefetch, or give the "
    "job more memory",
}
_WHY[-signal.SIGBUS] = _WHY[errno.ENOSPC]  # the page that it wrote to could not be had

# Closed at exit: multiprocessing would wait for ever for workers that nobody told to end. This module is imported, so
# its handler registered, after torch's, and handlers run in reverse order.
_open_loaders: weakref.WeakSet[Loader] = weakref.WeakSet()


class Loader:
    """Iterates the batches of the steps ``start_step`` .. ``stop_step - 1``, in order, once.

    ``workers`` processes prepare ``prefetch`` steps each ahead; 0 decodes in this process. ``pin``: batches lie in
    page-locked memory (only where CUDA is available). ``None`` takes the value of the config.
    Raises ``UserError`` when more than data.max_bad_samples different samples are broken, a worker dies, or one takes
    longer for a batch than parallel.timeout allows a step.
    """

    def __init__(
        self, step_dataset: StepDataset, start_step: int, stop_step: int, workers: int | None = None,
        prefetch: int | None = None, pin: bool = False,
    ):
        data = step_dataset.config.data
        workers = data.workers if workers is None else workers
        prefetch = data.prefetch if prefetch is None else prefetch
        workers = min(workers, max(0, stop_step - start_step))
        self._patience = _PATIENCE * step_dataset.config.parallel.timeout or float("inf")
        self._delivered = 0  # batches
        self.max_bad_samples = data.max_bad_samples
        self.bad_samples: set[str] = set()  # names of the samples found broken so far
        self.wait_seconds = 0.0  # time spent waiting in here for data, in all
        self._loader = DataLoader(
            _Guarded(step_dataset),
            batch_size=None,
            sampler=range(start_step, stop_step),
            num_workers=workers,
            prefetch_factor=max(1, prefetch) if workers else None,
            multiprocessing_context=START_METHOD if workers else None,
            pin_memory=pin and torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            timeout=_LOOK if workers else 0,
            generator=torch.Generator(),  # its own: the default would draw from, and so advance, the global generator
        )
        self._steps: Iterator[Batch | UserError] | None = None
        _open_loaders.add(self)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            if self._steps is None:
                self._steps = _start(self._loader)
            batch = self._wait()
        finally:
            self.wait_seconds += time.perf_counter() - start
        self._delivered += 1
        if isinstance(batch, UserError):
            raise batch
        self._count(batch.bad)
        return batch

    def _wait(self) -> Batch | UserError:
        patience = self._patience * (1 if self._delivered else _FIRST)
        start = time.monotonic()
        while True:
            try:
                return next(self._steps)
            except RuntimeError as error:
                if "DataLoader worker (pid" in str(error):
                    raise UserError(self._ended()) from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if (waited := time.monotonic() - start) > patience:
                number = self._delivered % len(self._steps._workers)  # they take turns
                raise UserError(
                    f"data worker {number} (pid {self._steps._workers[number].pid}) hangs: its batch has not come for "
                    f"{waited:.0f} s; look at the storage it reads from, or raise parallel.timeout"
                )

    def _ended(self) -> str:
        """What to say of the first worker that is gone."""
        workers = self._steps._workers
        number = next(number for number, worker in enumerate(workers) if not worker.is_alive())
        status = workers[number].exitcode
        why = _WHY.get(status, f"exit status {status}, its last words are above")
        return f"data worker {number} (pid {workers[number].pid}) ended: {why}"

    def close(self) -> None:
        """Stop the workers. The loader cannot go on afterwards."""
        steps, self._steps = self._steps, iter(())
        workers = getattr(steps, "_workers", ())
        if workers:
            deadline = time.monotonic() + _CLOSING
            for worker in workers:  # torch would give each one that hangs ten seconds, one after the other
                worker.join = partial(_join_or_kill, worker, deadline)
            # not left to the garbage collector: an exception's traceback may keep the iterator alive for long
            steps._shutdown_workers()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _count(self, bad: list[str]) -> None:
        for entry in bad:
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


@atexit.register
def _close_all() -> None:
    for loader in list(_open_loaders):
        loader.close()


class _Guarded(torch.utils.data.Dataset):
    """Hands a user error over as a value: torch would wrap a worker's exception in a page of traceback."""

    def __init__(self, step_dataset: StepDataset):
        self.step_dataset = step_dataset

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.step_dataset[step]
        except UserError as error:
            return error


def _start(loader: DataLoader) -> Iterator[Batch | UserError]:
    """Start the workers, and undo torch's SIGCHLD handler, which raises in the midst of whatever this process does when
    a worker dies. The iterator finds that out by itself within seconds, where it can be told to the user."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets the handler in the main thread only
    handler = signal.getsignal(signal.SIGCHLD)
    steps = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return steps


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's signals reach the whole process group. The trainer decides what they mean (it may write a
    # checkpoint first); a worker ends when the trainer closes it or is gone.
    serve_parent((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    # A batch that cannot be handed over would be lost, and awaited for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(partial(_cannot_hand_over, worker))


def _cannot_hand_over(worker: int, error: Exception, batch: object) -> NoReturn:
    reason = next(iter(str(error).splitlines()), "")
    print(f"data worker {worker}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
    os._exit(errno.ENOSPC if os.strerror(errno.ENOSPC) in reason else 1)


def _join_or_kill(worker: multiprocessing.Process, deadline: float, timeout: float | None = None) -> None:
    """``worker.join``, for a worker that may be stuck in a read, and is deaf to SIGTERM (see ``_start_worker``)."""
    type(worker).join(worker, max(0.0, deadline - time.monotonic()))
    if worker.is_alive():
        worker.kill()
        type(worker).join(worker, 1.0)  # a read that cannot be interrupted keeps it until it returns


class EvalDataset:
    """At most ``max_samples`` samples, spread evenly over the data set, in its order; images cropped to the centre and
    resized to ``size`` pixels. Nothing is random."""

    def __init__(
        self, dataset: ShardDataset, tokenizer: CaptionTokenizer, size: int, max_samples: int, max_pixels: int
    ):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.size = size
        self.max_pixels = max_pixels
        self._ends = np.cumsum(np.asarray(dataset.shard_counts, dtype=np.int64))
        self._total = int(self._ends[-1]) if len(self._ends) else 0
        self._count = min(self._total, max_samples)

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """The samples rank, rank + world, ... as dicts of index (b,), image uint8 (b, 3, size, size), tokens (b, T),
        caption list[str], meta list[dict]. A broken sample is left out and named in the log."""
        rows: list[tuple[int, torch.Tensor, RawSample]] = []
        for index in range(rank, self._count, world):
            row = self._row(index)
            if row is not None:
                rows.append(row)
            if len(rows) == batch_size:
                yield self._batch(rows)
                rows = []
        if rows:
            yield self._batch(rows)

    def _row(self, index: int) -> tuple[int, torch.Tensor, RawSample] | None:
        place = index * self._total // self._count
        shard = int(np.searchsorted(self._ends, place, side="right"))
        row = place - (int(self._ends[shard - 1]) if shard else 0)
        try:
            raw = self.dataset.read(shard, row)
            return index, center_crop(decode_image(raw.image, self.max_pixels), self.size), raw
        except BadSample as error:
            logger.warning("bad sample left out of the evaluation: %s: %s", self.dataset.name(shard, row), error)
            return None

    def _batch(self, rows: list[tuple[int, torch.Tensor, RawSample]]) -> dict[str, Any]:
        indices, images, raws = zip(*rows, strict=True)
        captions = [raw.caption for raw in raws]
        return {
            "index": torch.tensor(indices), "image": torch.stack(images), "tokens": self.tokenizer.encode(captions),
            "caption": captions, "meta": [raw.meta for raw in raws],
        }  # fmt: skip
