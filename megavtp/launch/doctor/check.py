"""The doctor looks for what would keep a run on many machines from starting, or make it slow, and names the remedy.

It first checks what needs only the rendezvous (versions, clocks, storage, ports), then collectives. Every wait has a
limit.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megavtp.launch import phase
from megavtp.launch.doctor import bandwidth
from megavtp.launch.doctor.bandwidth import Link
from megavtp.launch.doctor.links import Board, clock_offsets, clock_problems, port_problems, shared_storage_problems
from megavtp.launch.doctor.machine import Facts, by_host, compare, gather_facts, load_facts, ranks_in_words
from megavtp.launch.meeting import meet
from megavtp.launch.ranks import join, run_ranks
from megavtp.launch.rendezvous import Place, detect
from megavtp.options import Options, place, real, whole

_SHOWN = 16  # at most this many links are reported, the slowest ones


def main() -> int:
    """Check this rank for `launchers/doctor.py`; return the exit status: 0 if all is well, 1 if something is wrong."""
    arguments = _parse(sys.argv[1:])
    place = detect()
    phase.enter("meeting")
    store = meet(place, arguments.timeout)
    board = Board(store, place.rank, arguments.timeout)
    facts = _exchange_facts(board, place)
    if place.rank == 0:
        _print_machines(facts, place)
    problems = compare(facts) if place.rank == 0 else []
    _say(board, "versions and settings", problems, "alike on all ranks")
    leaders = [ranks[0] for ranks in by_host(facts).values()]
    closed = []
    problems += _storage(board, leaders, arguments.shared)
    if len(leaders) > 1:
        problems += _clocks(board, leaders)
        closed = port_problems(board, leaders)
        _say(board, "ports", closed, "every machine can connect to every other one")
    if place.rank == 0:
        board.put("go on", not closed)
    if place.world > 1:
        if board.get("go on"):
            problems += _speed(place, facts, join(place, store, arguments.timeout), arguments.megabytes)
        elif place.rank == 0:
            print("skip   speed: collectives need the ports")
    problems += closed
    if place.rank == 0:
        _print_verdict(problems)
        board.put("status", int(bool(problems)))
    status = board.get("status")
    board.put(f"done/{place.rank}", 0)
    if place.rank == 0:
        board.collect("done", range(place.world))  # this rank serves the store, which the others must have read
    return status


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


def _exchange_facts(board: Board, place: Place) -> list[Facts]:
    """Return the facts of all ranks, on all ranks."""
    board.put(f"facts/{place.rank}", gather_facts(place).dump())
    if place.rank == 0:
        board.put("all facts", board.collect("facts", range(place.world)))
    facts = [load_facts(text) for text in board.get("all facts")]
    board.hosts = {fact.rank: fact.host for fact in facts}
    return facts


def _print_machines(facts: Sequence[Facts], place: Place) -> None:
    hosts = by_host(facts)
    start = f"started by {place.launcher}, " if place.launcher not in ("none", "environment") else ""
    where = f", meeting at {place.master_addr}:{place.master_port}" if place.world > 1 else ""
    print(f"{start}ranks: {len(facts)}, machines: {len(hosts)}{where}")
    for host, ranks in hosts.items():
        devices = f"{ranks[0].devices} x {ranks[0].device}" if ranks[0].devices else "CPU"
        print(f"  {host}: rank {ranks_in_words([f.rank for f in ranks])}, {devices}, {ranks[0].address or 'local'}")
    print("  " + ", ".join(f"{name} {value}" for name, value in facts[0].versions.items() if value), flush=True)


def _say(board: Board, name: str, problems: Sequence[str], well: str) -> None:
    if board.rank == 0:
        print(f"WRONG  {name}: see below" if problems else f"ok     {name}: {well}", flush=True)


def _storage(board: Board, leaders: Sequence[Facts], folder: Path) -> list[str]:
    problems = shared_storage_problems(board, leaders, folder)
    well = f"all machines see {folder.absolute()}" if len(leaders) > 1 else f"{folder.absolute()} can be written to"
    _say(board, "shared storage" if len(leaders) > 1 else "storage", problems, well)
    return problems


def _clocks(board: Board, leaders: Sequence[Facts]) -> list[str]:
    offsets = clock_offsets(board, leaders)
    problems = clock_problems(offsets)
    _say(board, "clocks", problems, f"within {max(map(abs, offsets.values()), default=0):.3f} s")
    return problems


def _speed(place: Place, facts: Sequence[Facts], device: torch.device, megabytes: int) -> list[str]:
    """Measure; print on rank 0, and return what is slow."""
    hosts = by_host(facts)
    size = megabytes << 20
    seconds = bandwidth.all_reduce_seconds(size, device)
    across = bandwidth.links(bandwidth.rounds([ranks[0].rank for ranks in hosts.values()]), size, device)
    of_hosts = [bandwidth.rounds([fact.rank for fact in ranks]) for ranks in hosts.values()]
    together = [list(itertools.chain(*parallel)) for parallel in itertools.zip_longest(*of_hosts, fillvalue=[])]
    within = bandwidth.links(together, size, device)
    if place.rank > 0:
        return []
    bus = 2 * (place.world - 1) / place.world * size / seconds
    print(f"all-reduce of {megabytes} MiB over {place.world} ranks: {seconds * 1e3:.1f} ms, bus {bus / 1e9:.2f} GB/s")
    name = {fact.rank: f"{fact.rank} ({fact.host})" for fact in facts}
    problems = []
    for kind, found in (("between machines", across), ("within machines", within)):
        slow = bandwidth.slow_links(found)
        _print_links(kind, found, name)
        problems += [
            f"ranks {name[link.first]} and {name[link.second]} exchange {link.bytes_per_second / 1e9:.2f} GB/s, less "
            f"than a third of what is usual {kind}: look at cable, switch port, PCIe slot and other jobs there; "
            "NCCL_DEBUG=INFO shows the way NCCL takes" for link in slow
        ]
    return problems


def _print_links(kind: str, found: Sequence[Link], name: dict[int, str]) -> None:
    if not found:
        return
    ordered = sorted(found, key=lambda link: link.bytes_per_second)
    print(f"pairs {kind}, each sends and receives at once" + (", slowest first:" if len(found) > 1 else ":"))
    for link in ordered[:_SHOWN]:
        print(f"  {name[link.first]} - {name[link.second]}: {link.bytes_per_second / 1e9:.2f} GB/s each way")
    if len(found) > _SHOWN:
        fastest = ordered[-1].bytes_per_second / 1e9
        print(f"  and {len(found) - _SHOWN} more, the fastest {fastest:.2f} GB/s", flush=True)


def _print_verdict(problems: Sequence[str]) -> None:
    if not problems:
        print("all is well", flush=True)
        return
    print(f"{len(problems)} thing{'s' * (len(problems) > 1)} wrong:")
    for number, problem in enumerate(problems, 1):
        print(f"{number}. {problem}", flush=True)


def doctor() -> None:
    """Entry point; never returns."""
    run_ranks(main)
