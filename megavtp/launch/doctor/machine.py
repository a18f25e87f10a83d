"""Facts about each rank's machine, and a comparison that finds what does not fit together."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megavtp.launch.rendezvous import Member, own_address
from megavtp.parallel.deepspeed_adapter import SUPPORTED_VERSION

_PACKAGE = Path(__file__).resolve().parents[2]
_SHARED_MEMORY = 256 * 2**20  # bytes of /dev/shm that a rank needs, as its loader workers pass batches through it
_SETTINGS = ("NCCL_", "GLOO_", "TORCH_NCCL_", "FI_", "UCX_")


@dataclass(frozen=True)
class Facts:
    """What one rank says of itself.

    Attributes:
        address: the address at which other machines reach this one.
        versions: the version of each thing that must be the same everywhere; "" where it is not there.
        settings: environment variables of the communication libraries.
        shared_memory: free bytes of /dev/shm, None where there is none.
    """

    host: str
    rank: int
    local_rank: int
    address: str | None
    device: str
    devices: int
    versions: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)
    shared_memory: int | None = None


def gather_facts(member: Member) -> Facts:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
    return Facts(
        host=socket.gethostname(), rank=member.rank, local_rank=member.local_rank, address=own_address(member),
        device=torch.cuda.get_device_name(member.local_rank % gpus) if gpus else "CPU", devices=gpus,
        versions=_versions(gpus > 0), shared_memory=shared,
        settings={name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)},
    )


def _versions(gpu: bool) -> dict[str, str]:
    return {
        "python": platform.python_version(), "torch": torch.__version__, "deepspeed": _installed("deepspeed"),
        "numpy": _installed("numpy"), "megavtp": _source_hash(), "CUDA of torch": torch.version.cuda or "",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if gpu else "", "GPU driver": _driver() if gpu else "",
    }


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _source_hash() -> str:
    """Return a hash of this package's source files: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def by_host(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Group the ranks by machine, in the order of each machine's first rank."""
    return _grouped(facts, [fact.host for fact in facts])


def _grouped(facts: Sequence[Facts], values: Sequence[str]) -> dict[str, list[Facts]]:
    """Group the ranks by ``values``, one of each rank."""
    groups: dict[str, list[Facts]] = {}
    for fact, value in zip(facts, values):
        groups.setdefault(value, []).append(fact)
    return groups


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Write ranks as in [0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def compare(facts: Sequence[Facts]) -> list[str]:
    """Return what is wrong, each problem with its remedy."""
    problems = []
    for name in facts[0].versions:
        remedy = "update the checkout on all machines" if name == "megavtp" else "install the same version everywhere"
        problems += _different(facts, name, [fact.versions[name] or "none" for fact in facts], remedy)
    if (found := facts[0].versions["deepspeed"]) != SUPPORTED_VERSION:
        problems.append(f"deepspeed is {found}: pip install deepspeed=={SUPPORTED_VERSION}")
    devices = [fact.device for fact in facts]
    problems += _different(facts, "the device", devices, "start ranks on machines of one kind only")
    for name in sorted({name for fact in facts for name in fact.settings}):
        values = [fact.settings.get(name, "not set") for fact in facts]
        problems += _different(facts, name, values, "set it alike for all ranks")
    hosts = by_host(facts)
    for host, ranks in hosts.items():
        problems += [f"{host}: {text}" for text in _one_machine(ranks, several=len(hosts) > 1)]
    return problems


def _different(facts: Sequence[Facts], name: str, values: Sequence[str], remedy: str) -> list[str]:
    """Return the complaint, if any, about ranks that differ in ``name``; ``values`` holds each rank's value."""
    told = [
        f"{text} on rank{'s' * (len(who) > 1)} {ranks_in_words([f.rank for f in who])} ({', '.join(by_host(who))})"
        for text, who in _grouped(facts, values).items()
    ]
    return [f"{name} differs: {'; '.join(told)}: {remedy}"] if len(told) > 1 else []


def _one_machine(ranks: Sequence[Facts], several: bool) -> list[str]:
    """Return what is wrong on the machine of these ranks; ``several``: it is not the only machine."""
    problems = []
    local = sorted(fact.local_rank for fact in ranks)
    if len(set(local)) < len(local):
        problems.append(
            f"local ranks {local} are not all different: two launchers were started there, or two machines have the "
            "same name"
        )
    if 1 < ranks[0].devices < len(ranks):
        problems.append(f"{len(ranks)} ranks, but {ranks[0].devices} GPUs: start one rank per GPU")
    if several and ranks[0].address is None:
        problems.append(
            "no address at which the other machines could reach it: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to "
            "its network interface, and look at its own name in /etc/hosts"
        )
    free, needed = ranks[0].shared_memory, _SHARED_MEMORY * len(ranks)
    if free is not None and free < needed:
        problems.append(
            f"/dev/shm has {free / 2**20:.0f} MiB free for {len(ranks)} ranks, loader workers and NCCL need "
            f"{needed / 2**20:.0f} MiB: remove old files there, or docker run --shm-size=16g"
        )
    return problems
