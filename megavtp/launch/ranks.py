"""Process start-up and shutdown under the deepspeed launcher, torchrun, srun, or alone."""

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megavtp import cli
from megavtp.errors import UserError
from megavtp.launch import phase
from megavtp.launch.meeting import NO_LIMIT, meet
from megavtp.launch.rendezvous import Member, detect, gloo_interface
from megavtp.launch.verdict import limit_of
from megavtp.launch.watchdog import Watchdog
from megavtp.parallel.deepspeed_adapter import import_deepspeed
from megavtp.parallel.looking import PLACE

STOPPED = 143  # exit status after a signal (128 + SIGTERM): the state is saved, and the same command goes on from it
# Seconds that rank 0 has to report an error that all ranks find. If another rank left first, the launcher would end
# rank 0 before it could speak; a rank that no launcher has ended by then reports the error itself.
_PATIENCE = 15.0
_VERDICT_PATIENCE = 15.0  # seconds until it is known which rank's end broke a connection
_TERM_PATIENCE = 8.0  # the same for a rank that its launcher ends, as launchers kill after 30 s
# What gloo, NCCL and the rendezvous store say when another process has gone.
_PEER_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed",
    "ncclRemoteError", "Failed to recv", "failed to recv",
)
_watchdog: Watchdog | None = None


class _Terminated(BaseException):
    """Raised by SIGTERM or SIGHUP while there is nothing to save: before the first step, or after the last."""


def _on_stop_signal(signum, frame) -> None:
    raise _Terminated(signal.Signals(signum).name)


def start(timeout: float = 600) -> torch.device:
    """Initialise torch.distributed (NCCL with GPUs, else gloo), watch over the ranks, and return this rank's device.

    Args:
        timeout: seconds that all ranks have to arrive, and that a phase of a step may take; 0 = no limit.

    Raises:
        UserError: more local ranks than GPUs, or the rendezvous fails.
    """
    member = detect()
    return join(member, meet(member, timeout), timeout)


def join(member: Member, store: dist.Store, timeout: float) -> torch.device:
    """Do the second half of ``start``, once the ranks have met at ``store``."""
    global _watchdog
    device, backend = _device(member)
    import_deepspeed()
    os.environ.update({  # DeepSpeed takes LOCAL_RANK for the number of the GPU
        "RANK": str(member.rank), "LOCAL_RANK": str(member.local_rank if device.index is None else device.index),
        "WORLD_SIZE": str(member.world), "MASTER_ADDR": member.master_addr, "MASTER_PORT": str(member.master_port),
        PLACE: str(member.local_rank),
    })
    if backend == "gloo" and (interface := gloo_interface(member)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    _watchdog = Watchdog(store, member.rank, member.world, socket.gethostname(), timeout)
    _watchdog.start()
    limit = collective_limit(timeout)
    group = dist.PrefixStore("group", store)
    try:
        dist.init_process_group(backend, store=group, rank=member.rank, world_size=member.world, timeout=limit)
    except (RuntimeError, ValueError) as error:
        if _lost_others(error):
            raise
        raise UserError(
            f"rank {member.rank} of {member.world} could not join the others at {member.master}: "
            f"{str(error).splitlines()[0]}; python launchers/doctor.py looks for the reason"
        ) from None
    for name in cli.stop_signals():
        signal.signal(name, _on_stop_signal)
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    faulthandler.register(signal.SIGUSR1)
    return device


def collective_limit(timeout: float) -> timedelta:
    """Return how long a collective may take: longer than the watchdog lets any phase take, which knows whom to name."""
    return timedelta(seconds=min(limit_of(timeout, slow=True) + 60, NO_LIMIT))


def _device(member: Member) -> tuple[torch.device, str]:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        # srun can show each task one GPU alone, which is number 0 in all of them.
        index = 0 if member.launcher == "srun" and count == 1 else member.local_rank
        if index >= count:
            raise UserError(
                f"local rank {index} has no GPU: this machine has {count}; start at most that many processes on it "
                "(deepspeed --num_accelerators N, srun --ntasks-per-node N)"
            )
        torch.cuda.set_device(index)
        if "OMP_NUM_THREADS" not in os.environ:
            # The host copies and launches; more threads would take the cores from the loader's workers. And torch sets
            # one for the thread of the backward as soon as batches are pinned: compiled regions ask for equal numbers.
            torch.set_num_threads(1)
        return torch.device("cuda", index), "nccl"
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // member.local_world))
    return torch.device("cpu"), "gloo"


def stop() -> None:
    """Leave the process group together: without the barrier gloo's threads sometimes abort the exit."""
    global _watchdog
    if dist.is_initialized():
        phase.enter("leaving")
        dist.barrier()
        if _watchdog is not None:
            _watchdog.close()
            _watchdog = None
        dist.destroy_process_group()


def run_ranks(main: Callable[[], int | None]) -> NoReturn:
    """Run a launcher's ``main`` on this rank and exit with its status.

    0: finished. ``STOPPED``: the state is saved, and the run can be started again. 2: an error of the user's, told in
    one line. 3: a replay found something. 130: Ctrl-C. 1: a bug, or other ranks have failed, are lost or hang.

    Before the ranks are joined every rank finds the same error, so rank 0 reports it for all. Afterwards the
    rank that raises does, and the others are told and end within seconds. ``watchdog`` covers ranks that cannot.
    """
    phase.enter("starting", slow=True)  # this process may be a fork of one that imported this long ago
    cli.go_on_unread()
    try:
        status = main() or 0
        stop()
    except SystemExit as told:  # argparse: --help, or a usage error that it has explained
        status = told.code if isinstance(told.code, int) else 1
    except BaseException as error:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # what follows takes seconds
            signal.signal(name, signal.SIG_IGN)
        status = _tell_all(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _tell_all(error: BaseException) -> int:
    """Say on this rank's stderr, and to the other ranks, why this one ends; return the exit status."""
    if isinstance(error, UserError):
        return _user_error(error)
    if isinstance(error, KeyboardInterrupt):
        cli.tell_interrupted()
        _tell("was interrupted")
        return cli.INTERRUPTED
    where = phase.current().name
    told_to_end = isinstance(error, _Terminated)  # by somebody who ends the job, or as another rank has gone
    if told_to_end or _lost_others(error):
        patience = _TERM_PATIENCE if told_to_end else _VERDICT_PATIENCE
        known = _watchdog.reason(patience) if _watchdog is not None else None
        if told_to_end and not known:
            _say(f"was told to end ({error}) (this rank: {where})")
            return STOPPED
        known = known or f"if they left no message they were killed (memory?) [{str(error).splitlines()[0]}]"
        _say(f"ended because other ranks did: {known} (this rank: {where})")
    else:
        _say(f"failed in {where}:\n{''.join(traceback.format_exception(error))}")
        _tell(f"failed, {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    return 1


def _user_error(error: UserError) -> int:
    rank = _rank()
    joined = dist.is_initialized() and dist.get_world_size() > 1
    if rank > 0 and not joined:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # rank 0 has spoken and its launcher ends this one
        time.sleep(_PATIENCE)
    where = f"[rank {rank}] " if rank > 0 or joined else ""
    print(f"{where}error: {error}", file=sys.stderr, flush=True)
    _tell(f"met an error: {error}")
    return 2


def _say(text: str) -> None:
    print(f"[rank {_rank()}] {text}", file=sys.stderr, flush=True)


def _tell(text: str) -> None:
    if _watchdog is not None:
        _watchdog.tell(text)


def _rank() -> int:
    if dist.is_initialized():
        return dist.get_rank()
    try:
        return detect().rank
    except UserError:  # what the launcher set is wrong
        return 0


def _lost_others(error: BaseException) -> bool:
    """Tell whether a collective failed only because other ranks have left: their message is the one to read."""
    several = _watchdog is not None and int(os.environ["WORLD_SIZE"]) > 1
    return isinstance(error, RuntimeError) and several and any(sign in str(error) for sign in _PEER_GONE)
