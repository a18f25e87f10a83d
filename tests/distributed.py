"""Run a function on several gloo processes of this machine, for tests."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, by the one server that all processes of all tests are forked from: they would cost each of them
# seconds. The second is what DeepSpeed imports late: it compiles Muon's kernels, whichever optimizer is used.
multiprocessing.get_context("forkserver").set_forkserver_preload([
    "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "setuptools", "megavtp.training.launcher",
    "megavtp.dit.launcher", "matplotlib.backends.backend_agg", "matplotlib.figure",
])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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
