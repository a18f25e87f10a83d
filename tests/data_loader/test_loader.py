"""The loader: order, workers, limits, and what happens when a worker dies."""

import errno
import gc
import json
import logging
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from loader_fakes import LengthTokenizer, MemoryDataset, small_config

from megavtp.data import loader as loader_module
from megavtp.data.batch import Batch, StepDataset
from megavtp.data.handover import LoadedBatch, new_pictures
from megavtp.data.loader import Loader
from megavtp.errors import UserError


def make(dataset=None, rank=0, dp=1, **config):
    dataset = MemoryDataset() if dataset is None else dataset
    return StepDataset(dataset, LengthTokenizer(), small_config(**config), rank, dp)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_come_in_order_and_bit_equal_from_any_start(workers):
    direct = make(MemoryDataset(broken={(1, 3), (1, 4)}))
    with Loader(direct, 3, 9, workers=workers, prefetch=2) as loader:
        batches = list(loader)
    assert [batch.step for batch in batches] == [3, 4, 5, 6, 7, 8]
    assert all(same(batch, direct[batch.step]) for batch in batches)
    assert loader.wait_seconds > 0


def test_two_ranks_with_workers_make_up_one_process():
    shares = [Loader(make(rank=rank, dp=2), 2, 4, workers=1) for rank in range(2)]
    for whole, *parts in zip(Loader(make(), 2, 4, workers=0), *shares):
        assert sum((part.ids for part in parts), []) == whole.ids
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.masks for part in parts], 1), whole.masks)


@dataclass(frozen=True)
class SmallAndLarge(LoadedBatch):
    small: torch.Tensor
    large: torch.Tensor
    nothing: None


class SmallAndLargeSource:
    def __getitem__(self, step):
        large = torch.full((1 << 20,), step, dtype=torch.uint8)
        return SmallAndLarge(torch.full((3, 2), step), large, None, bad=["a: b"])


def test_only_large_tensors_come_through_shared_memory():
    source = SmallAndLargeSource()
    with Loader(source, 5, 7, workers=1) as loader:
        for step, batch in enumerate(loader, 5):
            assert batch.large.is_shared() and not batch.small.is_shared()
            assert same(batch, source[step])
            batch.small.add_(1)  # it may be written to


class PictureSource:
    """Batches of two pictures, which tell the address that the worker wrote the first one to, and its old content."""

    shapes = [(2, 0, 3), (40, 3, 40, 40), (5, 7)]
    size = 40 * 3 * 40 * 40 + 5 * 7

    def __getitem__(self, step):
        nothing, large, small = new_pictures(self.shapes)
        assert nothing.shape == (2, 0, 3)
        known = torch.tensor([large.data_ptr(), large.max(), large.is_shared()])
        large.fill_(step)
        return Pictures(known, large, small.fill_(step + 1), nothing)


@dataclass(frozen=True)
class Pictures(LoadedBatch):
    known: torch.Tensor
    large: torch.Tensor
    small: torch.Tensor
    nothing: torch.Tensor

    def has(self, step):
        shapes = [tuple(x.shape) for x in (self.nothing, self.large, self.small)]
        return shapes == PictureSource.shapes and bool((self.large == step).all() and (self.small == step + 1).all())


def pictures(workers=1, prefetch=1, size=PictureSource.size, steps=12):
    return Loader(PictureSource(), 1, 1 + steps, workers=workers, prefetch=prefetch, picture_bytes=size)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_write_pictures_to_the_same_memory_again_and_again(workers):
    places = []
    with pictures(workers) as loader:
        for step, batch in enumerate(loader, 1):
            assert batch.has(step) and batch.known[0] == batch.large.data_ptr()
            places.append(batch.known[0].item())
            batch.large.add_(1)  # they may be written to
    assert len(set(places)) <= 3 * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_pictures_that_somebody_holds_are_not_written_over(workers):
    with pictures(workers) as loader:
        kept = [batch.large[3:] for batch in loader]
    assert [set(part.unique().tolist()) for part in kept] == [{step} for step in range(1, 13)]


def test_one_picture_holds_the_memory_of_its_batch():
    with pictures() as loader:
        kept = [batch.small for batch in loader]
    assert [set(small.unique().tolist()) for small in kept] == [{step} for step in range(2, 14)]


@pytest.mark.parametrize("size", [0, PictureSource.size - mmap.PAGESIZE])
def test_pictures_without_a_place_go_through_new_shared_memory(size):
    with pictures(size=size) as loader:
        for step, batch in enumerate(loader, 1):
            assert batch.has(step) and batch.known[2] and batch.large.is_shared()


def test_without_memory_to_set_aside_the_loader_says_so_and_goes_on(monkeypatch, caplog):
    def none_left(*sizes):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(loader_module, "PictureMemory", none_left)
    with caplog.at_level(logging.WARNING, logger="megavtp.data.loader"), pictures(steps=3) as loader:
        assert all(batch.has(step) for step, batch in enumerate(loader, 1))
    assert "new shared memory for each batch" in caplog.text and "Cannot allocate memory" in caplog.text


def test_pictures_outlive_their_loader():
    with pictures(steps=2) as loader:
        batches = list(loader)
    del loader
    gc.collect()
    assert all(batch.has(step) for step, batch in enumerate(batches, 1))


def test_without_workers_pictures_are_not_shared():
    assert not any(batch.known[2] for batch in pictures(workers=0))


def test_a_step_does_not_depend_on_what_was_in_its_memory():
    source = make(contrastive=0.0)
    size = source.picture_bytes
    with Loader(source, 0, 30, workers=1, prefetch=1, picture_bytes=size) as loader:
        for step, batch in enumerate(loader):
            assert sum(x.nbytes for x in (batch.images, batch.global_crops, batch.local_crops)) == size
            assert same(batch, source[step])
            batch.images.fill_(255)


def test_no_steps_left():
    assert list(Loader(make(), 5, 5, workers=2)) == []


def test_the_global_generator_is_not_touched():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(Loader(make(), 0, 2, workers=1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_named_once_and_limited(workers, caplog):
    dataset = MemoryDataset(broken={(1, row) for row in range(4)})
    with caplog.at_level(logging.WARNING, logger="megavtp.data.loader"):
        with Loader(make(dataset), 0, 10, workers=workers) as loader:
            list(loader)  # four epochs
    assert len(loader.bad_samples) == len(caplog.messages) == 4
    assert all("shard-000001/" in message for message in caplog.messages)
    with Loader(make(dataset), 0, 10, workers=workers, max_bad_samples=2) as loader:
        with pytest.raises(UserError, match="3 bad samples, last: shard-000001/.*max_bad_samples=2"):
            list(loader)


def test_a_users_error_in_a_worker_arrives_as_one_line():
    dataset = MemoryDataset(broken={(s, r) for s in range(3) for r in range(23)})
    with Loader(make(dataset), 0, 2, workers=1) as loader:
        with pytest.raises(UserError, match="all broken") as error:
            next(loader)
    assert "\n" not in str(error.value)


class Bug(MemoryDataset):
    def read(self, shard, row):
        raise ZeroDivisionError("a bug")


def test_a_bug_is_not_called_a_users_error():
    with Loader(make(Bug()), 0, 2, workers=1) as loader:
        with pytest.raises(ZeroDivisionError):
            next(loader)


class Deadly(MemoryDataset):
    """Kills the worker that reads it, as the kernel does when memory runs out."""

    parent = os.getpid()

    def read(self, shard, row):
        if shard == 1 and row > 15 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(shard, row)


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_no_hang():
    handler = signal.getsignal(signal.SIGCHLD)
    with Loader(make(Deadly()), 0, 8, workers=2) as loader:
        with pytest.raises(UserError, match=r"data worker \d \(pid \d+\) ended: it was killed.*data.workers") as error:
            for _ in loader:
                time.sleep(0.01)
    assert "\n" not in str(error.value)
    assert signal.getsignal(signal.SIGCHLD) is handler  # nothing is raised in the midst of a training step


class NoRoom(Batch):
    """A batch for which there is no room, as torch tells of a small /dev/shm."""

    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")


class NoRoomDataset(StepDataset):
    def __getitem__(self, step):
        batch = super().__getitem__(step)
        return NoRoom(**vars(batch)) if step == 2 else batch


@pytest.mark.timeout(60)
def test_a_worker_without_shared_memory_is_an_error_that_names_it(capfd):
    config = small_config()
    with Loader(NoRoomDataset(MemoryDataset(), LengthTokenizer(), config, 0, 1), 0, 8, workers=2) as loader:
        with pytest.raises(UserError, match=r"data worker 0 \(pid \d+\) ended: /dev/shm, .* is full.*--shm-size"):
            list(loader)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_a_worker_without_shared_memory_for_its_pictures_is_one_too(monkeypatch, capfd):
    def no_room(size):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", no_room)
    with Loader(make(), 0, 8, workers=1) as loader:
        with pytest.raises(UserError, match=r"data worker 0 \(pid \d+\) ended: /dev/shm, .* is full.*--shm-size"):
            list(loader)
    assert "Traceback" not in capfd.readouterr().err


class Hanging(MemoryDataset):
    """Stuck in a read, as on storage that is gone; deaf to SIGTERM like every worker."""

    parent = os.getpid()

    def read(self, shard, row):
        if shard == 1 and os.getpid() != self.parent:
            time.sleep(600)
        return super().read(shard, row)


@pytest.mark.timeout(60)
def test_a_worker_that_hangs_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(loader_module, "_CLOSING", 1.0)
    start = time.monotonic()
    with Loader(make(Hanging()), 0, 50, workers=2, timeout=0.5) as loader:
        with pytest.raises(UserError, match=r"data worker \d \(pid \d+\) hangs: .* parallel.timeout") as error:
            list(loader)
        workers = workers_of(loader)
    assert "\n" not in str(error.value)
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - start < 15  # all are ended at once, not one after the other


def workers_of(loader: Loader) -> list:
    return list(loader._steps._workers)


@pytest.mark.timeout(60)
def test_closing_early_ends_the_workers():
    loader = Loader(make(), 0, 1000, workers=2)
    next(loader)
    workers = workers_of(loader)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    loader.close()
    assert list(loader) == []


@pytest.mark.timeout(60)
def test_workers_leave_signals_to_the_trainer():
    with Loader(make(), 0, 50, workers=2) as loader:
        next(loader)
        for worker in workers_of(loader):
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        assert [batch.step for batch in loader] == list(range(1, 50))


def test_it_works_outside_the_main_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(batch.step for batch in Loader(make(), 0, 3, workers=1)))
    thread.start()
    thread.join(60)
    assert seen == [0, 1, 2]


def _end_without_a_word(pids) -> None:
    """As a rank that is killed, or that the watchdog ends."""
    loader = Loader(make(Hanging()), 0, 1000, workers=2)
    loader._steps = loader_module._start(loader._loader)
    pids.send([worker.pid for worker in workers_of(loader)])
    os._exit(1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker stuck in a read outlives its rank")
@pytest.mark.timeout(60)
def test_no_worker_outlives_its_rank_even_if_stuck():
    ours, theirs = multiprocessing.Pipe()
    rank = multiprocessing.get_context("fork").Process(target=_end_without_a_word, args=(theirs,))
    rank.start()
    pids = ours.recv()
    rank.join()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(lives, pids)):
        time.sleep(0.02)
    left = [pid for pid in pids if lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


LEFT_OPEN = """
import sys
sys.path[:0] = {paths!r}
from test_loader import Loader, make
loader = Loader(make(), 0, 1000, workers=2)
next(loader)
print([worker.pid for worker in loader._steps._workers], flush=True)
keep = [loader]
keep.append(keep)
raise KeyError("the trainer fails and closes nothing")
"""


@pytest.mark.timeout(90)
def test_a_trainer_that_fails_ends_and_leaves_no_workers_behind():
    paths = [str(Path(__file__).parent), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN.format(paths=paths)], capture_output=True, text=True, timeout=60
    )
    assert "KeyError: 'the trainer fails" in run.stderr and run.returncode == 1
    for pid in json.loads(run.stdout):
        assert not Path(f"/proc/{pid}").exists()
