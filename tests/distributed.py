"""Run a function on several gloo processes of this machine, for tests."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import random
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, by the one server that all processes of all tests are forked from: they would cost each of them
# seconds. The second is torch's compiler, for the runs that compile.
multiprocessing.get_context("forkserver").set_forkserver_preload([
    "deepspeed", "torch._inductor.compile_fx", "setuptools", "megavtp.training.launcher",
    "megavtp.dit.launcher", "matplotlib.backends.backend_agg", "matplotlib.figure",
])


def _own_ports() -> Iterator[int]:
    """Ports that no other worker of pytest-xdist gives out. They lie below those that the system gives to connections,
    and begin somewhere: another run of the tests on this machine will do so elsewhere."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20_000 + worker, 32_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    first = random.SystemRandom().randrange(len(ports))
    return itertools.cycle([*ports[first:], *ports[:first]])


_PORTS = _own_ports()


def free_port() -> int:
    """A port at which nobody listens, and which nobody takes before the test does."""
    return next(port for port in _PORTS if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as sock, contextlib.suppress(OSError):
        sock.bind(("", port))
        return True
    return False


def _worker(rank: int, world_size: int, port: int, folder: str, timeout: float, fn: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage often: not through everything that was imported
    warnings.filterwarnings("ignore", category=FutureWarning)
    faulthandler.dump_traceback_later(timeout * 0.9, exit=True)  # a hang shows where, and ends
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    try:
        result = fn(rank, *args)
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # do not wait for peers that are stuck in a collective
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` processes with gloo initialised; return each rank's result.

    ``fn`` must be a top-level function. If a rank fails, all are ended and its traceback is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _worker, (world_size, free_port(), folder, timeout, fn, args), nprocs=world_size, join=False,
            start_method="forkserver",
        )
        try:
            deadline = timeout
            while not context.join(timeout=min(deadline, 5)):
                deadline -= 5
                if deadline <= 0:
                    raise TimeoutError(f"{fn.__name__} did not end on {world_size} ranks within {timeout} s")
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as failure:
            errors = sorted(Path(folder).glob("*.error"))
            raise AssertionError("\n".join(path.read_text() for path in errors) or str(failure)) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]
