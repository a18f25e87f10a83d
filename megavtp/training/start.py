"""What a run records of itself when it starts: the command, the layout, the machine and the code."""

import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from megavtp import __version__
from megavtp.launch.doctor.machine import gather_facts
from megavtp.launch.rendezvous import detect
from megavtp.parallel.mesh import Mesh

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 10.0  # seconds that git may take, which can be slow on a network's file system


def start_record(mesh: Mesh) -> dict[str, Any]:
    """Return the fields of the event ``started``. They are this process's; the first rank's are written."""
    member = detect()
    facts = gather_facts(member)
    return {
        "command": shlex.join(word for word in sys.argv if not word.startswith("--local_rank")),
        "layout": {
            "launcher": member.launcher, "processes": mesh.world_size, "machines": member.world // member.local_world,
            "tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp,
        },
        "machine": {
            "host": facts.host, "device": facts.device, "devices": facts.devices, "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "versions": {name: text for name, text in facts.versions.items() if name != "megavtp" and text}
        | {"megavtp": __version__, "source": facts.versions["megavtp"], "commit": commit()},
    }


@cache
def commit() -> str | None:
    """Return the commit of the checkout that this code lies in, marked if files differ from it; None without one."""
    if not (_ROOT / ".git").exists():  # an installed package may lie in a folder of somebody else's repository
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None
