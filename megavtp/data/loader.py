"""Steps in order from worker processes, with a limit on broken samples and no hang when a worker dies."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from megavtp.data.batch import Batch, StepDataset
from megavtp.errors import UserError

logger = logging.getLogger(__name__)

# Workers decode and augment on the CPU and touch no device, so forking is safe even after CUDA has started here; with
# one torch thread each they never enter a thread pool whose threads did not survive the fork. They start in
# milliseconds, where spawn and forkserver import torch again for seconds. Outside Linux fork itself is not safe.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Loader:
    """Iterates the batches of the steps ``start_step`` .. ``stop_step - 1``, in order, once.

    ``workers`` processes prepare ``prefetch`` steps each ahead; 0 decodes in this process. ``pin``: batches lie in
    page-locked memory (only where CUDA is available). ``None`` takes the value of the config.
    Raises ``UserError`` when more than data.max_bad_samples different samples are broken, or a worker dies.
    """

    def __init__(
        self, step_dataset: StepDataset, start_step: int, stop_step: int, workers: int | None = None,
        prefetch: int | None = None, pin: bool = False,
    ):
        data = step_dataset.config.data
        workers = data.workers if workers is None else workers
        prefetch = data.prefetch if prefetch is None else prefetch
        workers = min(workers, max(0, stop_step - start_step))
        self.max_bad_samples = data.max_bad_samples
        self.bad_samples: set[str] = set()  # "name: reason" of every sample found broken so far
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
            generator=torch.Generator(),  # its own: the default would draw from, and so advance, the global generator
        )
        self._steps: Iterator[Batch | UserError] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            if self._steps is None:
                self._steps = iter(self._loader)
            batch = next(self._steps)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise UserError(
                "a data worker was killed, most likely for lack of memory: lower data.workers or data.prefetch, or "
                f"give the job more memory (in a container also shared memory, --shm-size) [{_one_line(error)}]"
            ) from error
        finally:
            self.wait_seconds += time.perf_counter() - start
        if isinstance(batch, UserError):
            raise batch
        self._count(batch.bad)
        return batch

    def close(self) -> None:
        """Stop the workers. The loader cannot go on afterwards."""
        steps, self._steps = self._steps, iter(())
        del steps  # torch ends its workers when the iterator goes

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _count(self, bad: list[str]) -> None:
        for entry in bad:
            if entry in self.bad_samples:
                continue  # met again in a later epoch
            self.bad_samples.add(entry)
            logger.warning("bad sample replaced: %s", entry)
            if len(self.bad_samples) > self.max_bad_samples:
                raise UserError(
                    f"{len(self.bad_samples)} bad samples, last: {entry}; list them with `python tools/prepare_data.py "
                    f"check FOLDER`, or raise data.max_bad_samples={self.max_bad_samples}"
                )


class _Guarded(torch.utils.data.Dataset):
    """Hands a user error over as a value: torch would wrap a worker's exception in a page of traceback."""

    def __init__(self, step_dataset: StepDataset):
        self.step_dataset = step_dataset

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.step_dataset[step]
        except UserError as error:
            return error


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The trainer decides what they mean (it may write a
    # checkpoint first); a worker ends when the trainer closes it or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
