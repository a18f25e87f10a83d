"""Process start-up and shutdown under the deepspeed launcher, torchrun, or alone."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megavtp.errors import UserError
from megavtp.parallel.deepspeed_adapter import import_deepspeed

STOPPED = 143  # exit status after a signal (128 + SIGTERM): the state is saved, the same command goes on
# Seconds that rank 0 has to tell of an error that all ranks find. A rank that left before it would have the launcher
# end rank 0 in silence; one that is still here afterwards (no launcher ends it) tells its own.
_PATIENCE = 5.0
# What gloo, NCCL and the rendezvous store say when another process has gone.
_PEER_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed",
    "ncclRemoteError",
)


def environment_rank() -> tuple[int, int, int]:
    """(rank, local rank, world size) as the launcher set them; (0, 0, 1) when there was none."""
    read = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
    return read("RANK", 0), read("LOCAL_RANK", 0), read("WORLD_SIZE", 1)


def start(timeout_minutes: float = 30) -> torch.device:
    """Initialise torch.distributed (NCCL with GPUs, else gloo) and return this rank's device.

    Raises:
        UserError: more local ranks than GPUs, or the rendezvous fails.
    """
    rank, local_rank, world = environment_rank()
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start at most that "
                "many processes (deepspeed --num_accelerators N)"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world)))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    import_deepspeed()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if world == 1:
        os.environ.setdefault("MASTER_PORT", "0")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world))
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(minutes=timeout_minutes))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"rank {rank} of {world} could not join the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0]}"
            ) from None
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    faulthandler.register(signal.SIGUSR1)
    return device


def stop() -> None:
    """Leave the process group in step: without it gloo's threads sometimes abort the exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run_ranks(main: Callable[[], int | None]) -> NoReturn:
    """Run a launcher's ``main`` on this rank and exit with its status: 0 finished, ``STOPPED`` saved its state and can
    be started again, 2 an error of the user's (one line), 1 a bug, or other ranks that are gone.

    Before the ranks are joined every rank finds the same error, so rank 0 speaks for all; afterwards the rank that
    raises does. A rank that has spoken leaves at once: the launcher ends the others, none waits in a collective.
    """
    rank, _, world = environment_rank()
    try:
        status = main() or 0
        stop()
    except UserError as error:
        if rank > 0 and not dist.is_initialized():
            time.sleep(_PATIENCE)
        where = f"[rank {rank}] " if rank > 0 or (dist.is_initialized() and world > 1) else ""
        print(f"{where}error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        if _lost_others(error):
            reason = str(error).splitlines()[0]
            text = f"ended because other ranks did; if they left no message they were killed (memory?) [{reason}]"
        else:
            text = f"failed:\n{traceback.format_exc()}"
        print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _lost_others(error: BaseException) -> bool:
    """Whether a collective failed only because its peers have left: their message is the one to read."""
    return isinstance(error, RuntimeError) and dist.is_initialized() and any(sign in str(error) for sign in _PEER_GONE)
