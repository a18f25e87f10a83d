"""Process start-up and shutdown under the deepspeed launcher, torchrun, or alone."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megavtp.errors import UserError
from megavtp.parallel.deepspeed_adapter import import_deepspeed


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


def run_ranks(main: Callable[[], None]) -> NoReturn:
    """Run a launcher's ``main`` on this rank and exit: 0, 2 after a user's error (one line), 1 after a bug.

    Before the ranks are joined every rank finds the same error, so rank 0 speaks for all; afterwards the rank that
    raises does. A rank that fails leaves at once: the launcher ends the others, none waits in a collective.
    """
    rank, _, world = environment_rank()
    try:
        main()
        stop()
        status = 0
    except UserError as error:
        if rank == 0 or dist.is_initialized():
            where = f"[rank {rank}] " if dist.is_initialized() and world > 1 else ""
            print(f"{where}error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        print(f"[rank {rank}] failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopSignal:
    """SIGTERM and SIGINT as an agreement between ranks: all stop after the same step.

    Each step all ranks reduce their flag; the result of the step before is read, which has long arrived, so no rank
    waits for it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._raised = False
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._previous = {name: signal.signal(name, self._handle) for name in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, signum, frame) -> None:
        self._raised = True

    def agreed(self) -> bool:
        """Whether any rank had been told to stop before the last call. Collective: once per step on every rank."""
        arrived = False
        if self._pending is not None:
            flag, event = self._pending
            if event is not None:
                event.synchronize()
            arrived = bool(flag)
        flag, event = torch.tensor(float(self._raised), device=self._device), None
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag.is_cuda:
            flag, event = flag.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending = (flag, event)
        return arrived

    def close(self) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)
