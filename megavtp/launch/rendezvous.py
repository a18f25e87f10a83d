"""Which rank this process is, and where the ranks meet, from the environment of whichever launcher started it."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from megavtp.errors import UserError

# Variables with the number of ranks on this machine, and with the number of machines.
_SIZES = {"torchrun": ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"), "deepspeed": ("LOCAL_SIZE", "CROSS_SIZE")}
# Ports of SLURM jobs: below the range that systems hand out to outgoing connections (32768 and up on Linux).
_FIRST_PORT, _PORTS = 10_000, 20_000
_ELSEWHERE = "192.0.2.1"  # RFC 5737 sets this network aside: nobody is there, but the default route leads to it


@dataclass(frozen=True)
class Member:
    """This process as one of all that belong to the run.

    Attributes:
        launcher: "deepspeed", "torchrun" or "srun"; "environment" if RANK, WORLD_SIZE, ... were set by hand or another
            launcher; "none" for one process.
        local_rank, local_world: rank and number of processes on this machine.
        agent_store: torchrun itself serves the rendezvous store; otherwise rank 0 does.
    """

    launcher: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str
    master_port: int
    agent_store: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UserError(f"rank {self.rank} of {self.world} processes: ranks go from 0 to WORLD_SIZE - 1")
        if not 0 <= self.local_rank < self.local_world:
            raise UserError(
                f"local rank {self.local_rank} of {self.local_world} processes on this machine: local ranks go from 0 "
                "to their number - 1"
            )
        if self.local_world > self.world:
            raise UserError(f"{self.local_world} processes on this machine, but {self.world} in all")

    @property
    def master(self) -> str:
        return f"{self.master_addr}:{self.master_port}"


def detect(environment: Mapping[str, str] = os.environ) -> Member:
    """Return which member of the run the launcher made this process.

    The innermost launcher counts: a process of torchrun or deepspeed inside of an `srun` belongs to that launcher. A
    process in a SLURM job that `srun` did not start (the batch script's own) is alone.

    Raises:
        UserError: variables are missing, are not numbers, or contradict each other.
    """
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if "TORCHELASTIC_RUN_ID" in environment and "CROSS_SIZE" in environment:
        raise UserError(
            "variables of both torchrun (TORCHELASTIC_RUN_ID) and deepspeed (CROSS_SIZE) are set: start the ranks with "
            "one of them, and not from inside the other"
        )
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _of_variables(environment, tasks)
    if "SLURM_PROCID" in environment and tasks > 1:
        return _of_srun(environment, tasks)
    mpi = _number(environment, "OMPI_COMM_WORLD_SIZE", 1)
    if mpi > 1:
        raise UserError(
            f"mpirun started {mpi} processes, but gave them no RANK: start them with deepspeed, torchrun or srun"
        )
    return Member("none", 0, 1, 0, 1, "127.0.0.1", 0)


def _of_variables(environment: Mapping[str, str], tasks: int) -> Member:
    """Read RANK and its like, set by torchrun, by deepspeed or by hand."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environment:
            raise UserError(f"{other} is set but {name} is not: set both, or unset {other} for a single process")
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    marks = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
    launcher = next((name for mark, name in marks.items() if mark in environment), "environment")
    local_world, machines = _SIZES.get(launcher, ("LOCAL_WORLD_SIZE", None))
    if machines and tasks > 1 and _number(environment, machines, 1) == 1:
        raise UserError(
            f"srun started {tasks} tasks and each runs a {launcher} of its own, which knows of one machine only: let "
            "srun start the ranks (srun python SCRIPT), or give each torchrun --nnodes and --rdzv_endpoint"
        )
    if launcher == "environment" and tasks > 1:
        own = _number(environment, "SLURM_PROCID", 0)
        if (rank, world) != (own, tasks):
            raise UserError(
                f"RANK = {rank}, WORLD_SIZE = {world} are set, but srun made this process rank {own} of {tasks}: "
                "unset RANK, WORLD_SIZE and LOCAL_RANK before srun"
            )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and name not in environment:
            raise UserError(f"WORLD_SIZE = {world} but {name} is not set: set it to where rank 0 can be reached")
    return Member(
        launcher, rank, world, _number(environment, "LOCAL_RANK", 0 if "LOCAL_WORLD_SIZE" in environment else rank),
        _number(environment, local_world, world), environment.get("MASTER_ADDR", "127.0.0.1"),
        _number(environment, "MASTER_PORT", 0), environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_srun(environment: Mapping[str, str], tasks: int) -> Member:
    """Read SLURM's variables of an `srun` step, which tell everything but where to meet."""
    node = _number(environment, "SLURM_NODEID", 0)
    per_node = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    master = environment.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
    if master is None:
        raise UserError("neither MASTER_ADDR nor SLURM_STEP_NODELIST is set: set MASTER_ADDR to the first node's name")
    if node >= len(per_node):
        raise UserError(
            f"SLURM_NODEID = {node}, but SLURM_STEP_TASKS_PER_NODE = {environment['SLURM_STEP_TASKS_PER_NODE']} has "
            f"{len(per_node)} nodes: SLURM_* variables were changed between srun and this process"
        )
    port = _port(_number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0))
    return Member(
        "srun", _number(environment, "SLURM_PROCID"), tasks, _number(environment, "SLURM_LOCALID"), per_node[node],
        master, _number(environment, "MASTER_PORT", port),
    )


def _port(job: int, step: int) -> int:
    """Choose a port that is the same on all nodes, and differs between jobs and steps that run side by side."""
    return _FIRST_PORT + (job * 37 + step) % _PORTS


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        given = f"{name} is not set" if text is None else f"{name} = {text!r} is not a number"
        raise UserError(f"environment variable {given}: the launcher should set it, or unset the others") from None


def expand_counts(text: str) -> list[int]:
    """Expand SLURM's short form of a list of numbers: "2(x3),1" -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE = {text!r} is not a list such as 8(x4),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first name of SLURM's short form of a list of hosts: "gpu[003-006,9]-ib,login1" -> "gpu003-ib".

    In a step's list this is the host of task 0. A name may have several brackets.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r} names no host: set MASTER_ADDR to the first node's name")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def gloo_interface(member: Member) -> str | None:
    """Return the network interface that gloo should use on this machine, None to leave the choice to gloo.

    gloo takes the address that the machine's own name resolves to. On many systems that is 127.0.0.1, which the other
    machines would then be told to connect to.
    """
    own = own_address(member)
    addresses = psutil.net_if_addrs().items() if own else ()
    return next((name for name, found in addresses if any(address.address == own for address in found)), None)


def own_address(member: Member) -> str | None:
    """Return the address at which other machines reach this one; None if there is no other machine, or no route."""
    own = _address_towards(member.master_addr)
    if own is None or own.startswith("127."):  # on the master itself its name may be a loopback address, too
        own = _address_towards(_ELSEWHERE) if member.local_world < member.world else None
    return own


def _address_towards(host: str) -> str | None:
    """Return this machine's own address on the route to ``host``."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # no packet is sent: the system only picks a route
            return probe.getsockname()[0]
    except OSError:
        return None
