"""A run of made-up steps in which one rank goes wrong: `faulty.py KIND RANK TIMEOUT`, also under a launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from megavtp.errors import UserError
from megavtp.launch import phase, ranks, watchdog
from megavtp.parallel.collectives import all_gather_object

STEP = 3  # in which it happens, in the second pass


def _raise() -> None:
    raise ValueError("made up")


def _user_error() -> None:
    raise UserError("the disk of this machine is full")


def _hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(600)  # PyDLL: no other Python thread runs meanwhile


FAULTS: dict[str, Callable[[], None]] = {
    "raises": _raise,
    "user error": _user_error,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is suspended": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs": lambda: time.sleep(600),
    "hangs in C": _hold_the_interpreter,
}


def run(kind: str, victim: int, timeout: float, rank: int | None = None) -> None:
    """Never returns; ``rank`` as a hook of ``launched.Ranks`` gets it."""

    def main() -> int:
        ranks.start(timeout)
        for step in range(1, 100_000):
            for name in ("contrastive", "reconstruction"):
                phase.enter(f"step {step}, pass {name}")
                if step == STEP and name == "reconstruction" and int(os.environ["RANK"]) == victim:
                    time.sleep(1.5)  # the others have heard where it is
                    print(f"at {time.time()}", file=sys.stderr, flush=True)
                    FAULTS[kind]()
                all_gather_object(step)
                time.sleep(0.02)
        return 0

    if kind == "hangs in C":
        watchdog.STUCK = 8.0
    ranks.run_ranks(main)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run(given[0], int(given[1]), float(given[2]))
