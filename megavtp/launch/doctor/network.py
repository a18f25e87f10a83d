"""Checks from machine to machine: clocks, shared storage, ports. They need only the rendezvous store.

The lowest rank of a machine, its leader, speaks for it. Every rank calls every check, and all get the same result.
"""

import json
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavtp.errors import UserError
from megavtp.launch.doctor.machine import Facts, ranks_in_words
from megavtp.launch.meeting import await_ranks

_COMPARISONS = 8  # of two clocks; the fastest answer is the most exact
_SKEW = 1.0  # seconds that two clocks may differ; beyond it logs and file times cannot be put in order
_CONNECT = 5.0  # seconds for a connection
_POLL = 0.002
_VISIBLE = 8.0  # seconds until a file must be seen; network file systems cache for a while that it was not there


class Board:
    """A board at the store, on which ranks leave each other values under names; every wait has a limit.

    Attributes:
        hosts: the machine of each rank, once known; only used to name a rank that does not answer.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limit: float):
        self._store, self.rank, self._world, self._limit = store, rank, world, limit
        self.hosts: Mapping[int, str] = {}

    def put(self, name: str, value: Any) -> None:
        self._store.set(f"doctor/{name}", json.dumps(value))

    def get(self, name: str) -> Any:
        """Wait for a value, longer than rank 0 does, which knows who is to blame. UserError if it does not come."""
        limit = 2 * self._limit + 5
        try:
            self._store.wait([f"doctor/{name}"], timedelta(seconds=limit))
        except RuntimeError:
            raise UserError(
                f"rank {self.rank} waited for {name!r}, and rank 0 has ended or did not answer within {limit:.0f} s: "
                "its message says why"
            ) from None
        return json.loads(self._store.get(f"doctor/{name}"))

    def collect(self, name: str, ranks: Sequence[int]) -> list[Any]:
        """Return, on rank 0, the values that ``ranks`` have put under ``name/RANK``."""
        missing = await_ranks(self._store, f"doctor/{name}", ranks, time.monotonic() + self._limit, _POLL)
        if missing:
            where = ", ".join(sorted({self.hosts[rank] for rank in missing if rank in self.hosts}))
            raise UserError(
                f"rank{'s' * (len(missing) > 1)} {ranks_in_words(missing)}{f' ({where})' * bool(where)} did not "
                f"answer {name!r} within {self._limit:.0f} s: look there for a message, or for a "
                "process that hangs (py-spy dump --pid PID; kill -USR1 PID prints its stack)"
            )
        return [json.loads(text) for text in self._store.multi_get([f"doctor/{name}/{rank}" for rank in ranks])]

    def share(self, name: str, value: Any) -> list[Any]:
        """Return every rank's ``value``, by rank, on every rank."""
        self.put(f"{name}/{self.rank}", value)
        if self.rank == 0:
            self.put(f"all {name}", self.collect(name, range(self._world)))
        return self.get(f"all {name}")


def clock_offsets(board: Board, leaders: Sequence[Facts]) -> dict[str, float]:
    """Return by how many seconds each machine's clock is ahead of rank 0's.

    The other's time is compared with the middle between question and answer, as NTP does.
    """
    offsets = {leaders[0].host: 0.0}
    for leader in leaders[1:]:
        found = []
        for number in range(_COMPARISONS):
            question, answer = f"clock/{leader.rank}/ask/{number}", f"clock {number}"
            if board.rank == 0:
                before, at = time.monotonic(), time.time()
                board.put(question, 0)
                (there,) = board.collect(answer, [leader.rank])
                took = time.monotonic() - before
                found.append((took, there - (at + took / 2)))
            elif board.rank == leader.rank:
                board.get(question)
                board.put(f"{answer}/{board.rank}", time.time())
        offsets[leader.host] = min(found, default=(0.0, 0.0))[1]
    return board.share("clocks", offsets)[0]


def clock_problems(offsets: Mapping[str, float]) -> list[str]:
    return [
        f"the clock of {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of "
        f"{next(iter(offsets))}: switch time synchronisation on (chrony, systemd-timesyncd)"
        for host, offset in offsets.items() if abs(offset) > _SKEW
    ]


def storage_problems(board: Board, leaders: Sequence[Facts], folder: Path) -> list[str]:
    """Check whether all machines can write into ``folder``, and see what one of them writes. The files are removed."""
    ranks = [leader.rank for leader in leaders]
    own = folder / f".megavtp-doctor-{board.rank}-{secrets.token_hex(4)}"
    error = ""
    try:
        if board.rank in ranks:
            own.write_text(str(board.rank))
    except OSError as failure:
        error = failure.strerror or str(failure)
    try:
        everyone = board.share("storage", {"file": str(own.absolute()), "error": error})
        written = [everyone[rank] for rank in ranks]
        seen = board.share("seen", _visible(written if board.rank == 0 else written[:1]))
    finally:
        with suppress(OSError):
            own.unlink()
    problems = []
    for leader, entry, is_seen in zip(leaders, written, seen[0]):
        if entry["error"]:
            problems.append(
                f"{leader.host} cannot write into {folder} ({entry['error']}): name with --shared the folder of the "
                "checkpoints, which must be there and be one that all machines can write to"
            )
        elif not (is_seen and seen[leader.rank][0]):
            problems.append(
                f"{folder} is not the same folder on {leaders[0].host} and {leader.host}: checkpoints and data must be "
                "on a shared file system, under the same path (--shared names the folder here)"
            )
    return problems


def _visible(entries: Sequence[Mapping[str, str]]) -> list[bool]:
    """Return for each file whether it appears here in time; one that could not be written is not waited for."""
    deadline = time.monotonic() + _VISIBLE
    while True:
        seen = [bool(entry["error"]) or Path(entry["file"]).exists() for entry in entries]
        if all(seen) or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


def port_problems(board: Board, leaders: Sequence[Facts]) -> list[str]:
    """Check whether each machine can connect to each other one, at a port of the system's choice.

    gloo and NCCL need this between all machines, not only towards rank 0.
    """
    token = secrets.token_bytes(8)
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=_greet, args=(server, token), daemon=True).start()
        open_ports = board.share("port", {"port": server.getsockname()[1], "token": token.hex()})
        own = next((leader for leader in leaders if leader.rank == board.rank), None)
        problems = []
        for leader in leaders:
            if own is not None and leader is not own and leader.address is not None:
                port, expected = open_ports[leader.rank]["port"], bytes.fromhex(open_ports[leader.rank]["token"])
                if reason := _try(leader.address, port, expected):
                    problems.append(
                        f"{own.host} cannot connect to {leader.host} ({leader.address}:{port}: {reason}): open all "
                        "ports between the machines in the firewall"
                    )
        return [problem for found in board.share("connected", problems) for problem in found]


def _greet(server: socket.socket, token: bytes) -> None:
    with suppress(OSError):  # when the server is closed
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(token)


def _try(address: str, port: int, token: bytes) -> str:
    """Return why there is no connection, or "" if there is one."""
    try:
        with socket.create_connection((address, port), _CONNECT) as connection:
            received = connection.makefile("rb").read(len(token))
    except OSError as error:
        return error.strerror or f"no answer within {_CONNECT:.0f} s"
    return "" if received == token else "somebody else answers there: two machines have this address"
