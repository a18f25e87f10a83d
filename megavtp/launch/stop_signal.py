"""Signals ask a run to stop, and all ranks agree on the step after which they do."""

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megavtp.cli import stop_signals

_LAUNCHERS = {
    "deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run",
}
_WATCH_SECONDS = 1.0  # seconds between two looks at the launchers


class StopSignal:
    """SIGTERM, SIGHUP, SIGINT and the launcher's end as an agreement between ranks: all stop after the same step.

    Each step all ranks reduce their flag; the result of the step before is read, which has long arrived, so no rank
    waits for it.

    What launchers make of a signal (DeepSpeed 0.19.8, torch 2.13):

    - `deepspeed` is two processes above the ranks of a node, the runner and the node's launcher. On a single node the
      runner handles no signal: SIGTERM ends it alone, and the ranks would go on with nobody waiting for them. So they
      watch the chain of launchers above them, and one that is gone counts as a signal.
    - When the node's launcher is killed, the runner ends with 0, as if all were done. Only the ranks can tell.
    - The node's launcher (Ctrl-C and schedulers reach it, as they signal the whole group) sends SIGTERM to one rank
      after the other with all its descendants, kills each after 30 s, and exits with 1. It is enough that
      one rank was told, so the 30 s are left for the step under way and the save.
    - torchrun passes SIGTERM, SIGINT and SIGHUP on to all ranks, kills after 30 s, and exits with 1.

    Loader workers get these signals too and ignore them: the trainer closes them.

    Attributes:
        told: what told this rank to stop; "" if nothing did.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.told = ""
        self._flag = torch.zeros(())  # what the ranks agreed on in the step before, once it is copied
        self._copied: torch.cuda.Event | None = None
        self._next_watch = 0.0
        interrupt = [] if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else [signal.SIGINT]  # as ``cli.guard``
        self._previous = {name: signal.signal(name, self._handle) for name in (*interrupt, *stop_signals())}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.told = signal.Signals(signum).name

    def agreed(self) -> bool:
        """Tell whether any rank had been told to stop before the last call; every rank calls this once per step."""
        if self._copied is not None:
            self._copied.synchronize()
        arrived = bool(self._flag)
        if time.monotonic() >= self._next_watch:
            if not self.told and not all(_is_parent(parent, process) for process, parent in _CHAIN):
                self.told = "the launcher has gone"
            self._next_watch = time.monotonic() + _WATCH_SECONDS
        # Filled on the device: a copied host value would wait for all that is still to be computed.
        self._flag, self._copied = torch.full((), float(bool(self.told)), device=self._device), None
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._flag, dist.ReduceOp.MAX)
        if self._flag.is_cuda:
            self._flag, self._copied = self._flag.to("cpu", non_blocking=True), torch.cuda.Event()
            self._copied.record()
        return arrived

    def close(self) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)


def _chain() -> list[tuple[psutil.Process, int]]:
    """Return (process, its parent's id) from this process up, as long as the parent is a launcher."""
    found = []
    with suppress(psutil.Error):  # one that is gone or hidden cannot be watched
        process = psutil.Process()
        while (parent := process.parent()) and _LAUNCHERS & {Path(argument).name for argument in parent.cmdline()[:4]}:
            found.append((process, parent.pid))
            process = parent
    return found


def _is_parent(parent: int, process: psutil.Process) -> bool:
    """Tell whether the parent still lives: an orphan gets another parent at once."""
    try:
        return process.ppid() == parent
    except psutil.Error:
        return False


_CHAIN = _chain()  # at start-up, so that a runner that ends before the first step is missed
