"""The doctor looks for what would keep a run on many machines from starting, or make it slow, and names the remedy.

It first checks what needs only the rendezvous (versions, clocks, storage, ports), then collectives. Every wait has a
limit. All ranks come to the same result, and rank 0 tells it.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megavtp.launch import phase
from megavtp.launch.doctor import bandwidth
from megavtp.launch.doctor.bandwidth import Link
from megavtp.launch.doctor.machine import Facts, by_host, compare, gather_facts, ranks_in_words
from megavtp.launch.doctor.network import Board, clock_offsets, clock_problems, port_problems, storage_problems
from megavtp.launch.meeting import meet
from megavtp.launch.ranks import join, run_ranks
from megavtp.launch.rendezvous import Member, detect
from megavtp.options import Options, place, real, whole

_SHOWN = 16  # at most this many links are reported, the slowest ones


def main() -> int:
    """Check this rank for `launchers/doctor.py`; return the exit status: 0 if all is well, 1 if something is wrong."""
    arguments = _parse(sys.argv[1:])
    member = detect()
    phase.enter("meeting")
    store = meet(member, arguments.timeout)
    board = Board(store, member.rank, member.world, arguments.timeout)
    facts = [Facts(**fields) for fields in board.share("facts", vars(gather_facts(member)))]
    board.hosts = {fact.rank: fact.host for fact in facts}
    leaders = [ranks[0] for ranks in by_host(facts).values()]
    problems: list[str] = []

    def say(text: str) -> None:
        if member.rank == 0:
            print(text, flush=True)

    def tell(name: str, found: Sequence[str], well: str) -> None:
        say(f"WRONG  {name}: see below" if found else f"ok     {name}: {well}")
        problems.extend(found)

    say(_machines(facts, member))
    tell("versions and settings", compare(facts), "alike on all ranks")
    several, folder = len(leaders) > 1, arguments.shared.absolute()
    well = f"all machines see {folder}" if several else f"{folder} can be written to"
    tell("shared storage" if several else "storage", storage_problems(board, leaders, arguments.shared), well)
    closed = []
    if several:
        offsets = clock_offsets(board, leaders)
        tell("clocks", clock_problems(offsets), f"within {max(map(abs, offsets.values())):.3f} s")
        closed = port_problems(board, leaders)
        tell("ports", closed, "every machine can connect to every other one")
    if closed:
        say("skip   speed: collectives need the ports")
    elif member.world > 1:
        device = join(member, store, arguments.timeout)
        measured, slow = _speed(member, facts, device, arguments.megabytes)
        say(measured)
        problems += slow
    say(f"{len(problems)} thing{'s' * (len(problems) > 1)} wrong:" if problems else "all is well")
    for number, problem in enumerate(problems, 1):
        say(f"{number}. {problem}")
    board.put(f"done/{member.rank}", 0)
    if member.rank == 0:
        board.collect("done", range(member.world))  # this rank serves the store, which the others must have read
    return int(bool(problems))


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = Options(
        prog="deepspeed --hostfile hosts launchers/doctor.py",
        description="Check machines, network and shared storage before a run. Start it as the run will be started.",
        epilog="srun --ntasks-per-node=8 python launchers/doctor.py; torchrun --nnodes ... launchers/doctor.py",
    )
    parser.add_argument(
        "--shared", type=place, default=Path("."), metavar="DIR",
        help="folder that all machines should share, such as output_dir's parent; default: the current one",
    )
    seconds, size = real(0, 1e6, above=True), whole(1, 65_536)
    parser.add_argument("--timeout", type=seconds, default=60, metavar="S", help="seconds that any answer may take")
    parser.add_argument("--megabytes", type=size, default=64, metavar="MIB", help="size of the exchanged data")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    return parser.parse_args(given)


def _machines(facts: Sequence[Facts], member: Member) -> str:
    hosts = by_host(facts)
    start = f"started by {member.launcher}, " if member.launcher not in ("none", "environment") else ""
    where = f", meeting at {member.master}" if member.world > 1 else ""
    lines = [f"{start}ranks: {len(facts)}, machines: {len(hosts)}{where}"]
    for host, ranks in hosts.items():
        devices = f"{ranks[0].devices} x {ranks[0].device}" if ranks[0].devices else "CPU"
        numbers = ranks_in_words([fact.rank for fact in ranks])
        lines.append(f"  {host}: rank {numbers}, {devices}, {ranks[0].address or 'local'}")
    lines.append("  " + ", ".join(f"{name} {value}" for name, value in facts[0].versions.items() if value))
    return "\n".join(lines)


def _speed(member: Member, facts: Sequence[Facts], device: torch.device, megabytes: int) -> tuple[str, list[str]]:
    """Measure; return what was found, and what of it is slow."""
    hosts = by_host(facts)
    size = megabytes << 20
    seconds = bandwidth.all_reduce_seconds(size, device)
    across = bandwidth.links(bandwidth.rounds([ranks[0].rank for ranks in hosts.values()]), size, device)
    in_hosts = [bandwidth.rounds([fact.rank for fact in ranks]) for ranks in hosts.values()]
    together = [list(itertools.chain(*parallel)) for parallel in itertools.zip_longest(*in_hosts, fillvalue=[])]
    within = bandwidth.links(together, size, device)
    bus = 2 * (member.world - 1) / member.world * size / seconds
    lines = [
        f"all-reduce of {megabytes} MiB over {member.world} ranks: {seconds * 1e3:.1f} ms, bus {bus / 1e9:.2f} GB/s"
    ]
    name = {fact.rank: f"{fact.rank} ({fact.host})" for fact in facts}
    problems = []
    for kind, found in (("between machines", across), ("within machines", within)):
        lines += _table(kind, found, name)
        problems += [
            f"ranks {name[link.first]} and {name[link.second]} exchange {link.bytes_per_second / 1e9:.2f} GB/s, less "
            f"than a third of what is usual {kind}: look at cable, switch port, PCIe slot and other jobs there; "
            "NCCL_DEBUG=INFO shows the way NCCL takes" for link in bandwidth.slow_links(found)
        ]
    return "\n".join(lines), problems


def _table(kind: str, found: Sequence[Link], name: Mapping[int, str]) -> list[str]:
    if not found:
        return []
    ordered = sorted(found, key=lambda link: link.bytes_per_second)
    lines = [f"pairs {kind}, each sends and receives at once" + (", slowest first:" if len(found) > 1 else ":")]
    for link in ordered[:_SHOWN]:
        lines.append(f"  {name[link.first]} - {name[link.second]}: {link.bytes_per_second / 1e9:.2f} GB/s each way")
    if len(found) > _SHOWN:
        fastest = ordered[-1].bytes_per_second / 1e9
        lines.append(f"  and {len(found) - _SHOWN} more, the fastest {fastest:.2f} GB/s")
    return lines


def doctor() -> None:
    """Check every rank; this is the entry point and never returns."""
    run_ranks(main)
