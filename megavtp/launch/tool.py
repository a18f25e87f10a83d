"""A tool that can share its work runs in all processes of a launcher, or alone."""

import argparse
import logging
from collections.abc import Callable
from typing import NoReturn

import torch

from megavtp import cli
from megavtp.errors import UserError
from megavtp.launch import ranks
from megavtp.launch.meeting import meet
from megavtp.launch.rendezvous import detect
from megavtp.parallel.mesh import SINGLE, Mesh, build_mesh

_ARRIVAL = 600.0  # seconds that the processes have to find each other


def run_tool(main: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> NoReturn:
    """Call ``main`` with the options and exit, as ``cli.run`` does, or under a launcher as ``ranks.run_ranks`` does.

    What stops one process then stops all.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        alone = detect().world == 1
    except UserError:
        alone = True  # ``main`` meets the same error, and reports it
    (cli.run if alone else ranks.run_ranks)(lambda: main(options))


def join_others(device: str) -> tuple[torch.device, Mesh]:
    """Return this process's device, and the mesh of all processes as data-parallel ranks.

    Raises:
        UserError: as ``ranks.start`` does; there is no such ``device``, or one was named for several processes.
    """
    member = detect()
    if member.world == 1:
        return choose_device(device), SINGLE
    if device != "auto":
        raise UserError(f"--device {device} is for a single process; several take a GPU each, or the CPU")
    # How long a share takes depends on the user's data, so no process counts as hung. A lost one is still found.
    return ranks.join(member, meet(member, _ARRIVAL), 0), build_mesh(1, 1, timeout=ranks.collective_limit(0))


def choose_device(name: str) -> torch.device:
    """Return the device of that name, a GPU for "auto" if there is one. UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: no such device here; use auto, cpu, cuda or cuda:N") from None
    return device
