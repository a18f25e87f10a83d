"""Start two processes on a machine without a GPU, where the deepspeed launcher would start one.

Without a number from the user it counts the CPU as one accelerator. But a CPU has more than one core, and with two
processes a trial run is a parallel run.
"""

from __future__ import annotations

import os
import sys

import psutil
import torch

_TOLD = {"--num_accelerators", "--num_gpus", "--include", "--hostfile", "--num_nodes", "-H", "-i"}


def start_two_on_a_cpu() -> None:
    """Replace this process by a launch of the same command on two, if the launcher alone chose a single one."""
    if "--dry-run" in sys.argv or not alone_on_a_cpu_without_being_told():
        return
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    port = ["--master_port", os.environ["MASTER_PORT"]]  # the user may have given one
    own = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    os.execvp(sys.executable, [*runner, *port, sys.argv[0], *own])


def processes_of_run(world: int) -> int:
    """Return on how many processes the command would train; a dry run itself stays one process."""
    return 2 if alone_on_a_cpu_without_being_told() else world


def alone_on_a_cpu_without_being_told() -> bool:
    """Tell whether this is the only process, has no GPU, and no option of the deepspeed launcher asked for that."""
    if not {"RANK", "CROSS_SIZE"} <= os.environ.keys() or os.environ.get("WORLD_SIZE") != "1":
        return False
    if torch.cuda.is_available() or "--device" in _names(sys.argv):
        return False
    above = [argument for parent in psutil.Process().parents()[:3] for argument in _command(parent)]
    return not _names(above) & _TOLD


def _names(arguments: list[str]) -> set[str]:
    """Return the names of the options among ``arguments``, without their values."""
    return {argument.split("=")[0] for argument in arguments}


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
