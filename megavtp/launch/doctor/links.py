"""Checks between the machines: clocks, shared storage, ports. They need only the rendezvous store.

The lowest rank of a machine, its leader, speaks for it.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavtp.errors import UserError
from megavtp.launch.doctor.machine import Facts, ranks_in_words

_ROUNDS = 8  # comparisons of two clocks; the fastest answer is the most exact
_SKEW = 1.0  # seconds that two clocks may differ; beyond it logs and file times cannot be put in order
_CONNECT = 5.0  # seconds for a connection
_POLL = 0.002
_VISIBLE = 8.0  # seconds until a file must be seen; network file systems cache for a while that it was not there


class Board:
    """A board at the store, on which ranks leave each other values under names; every wait has a limit.

    Attributes:
        hosts: the machine of each rank, once known; only used to name a rank that does not answer.
    """

    def __init__(self, store: dist.Store, rank: int, limit: float):
        self._store, self.rank, self._limit = store, rank, limit
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
        keys = [f"doctor/{name}/{rank}" for rank in ranks]
        deadline = time.monotonic() + self._limit
        while missing := [rank for rank, key in zip(ranks, keys) if not self._store.check([key])]:
            if time.monotonic() > deadline:
                where = ", ".join(sorted({self.hosts[rank] for rank in missing if rank in self.hosts}))
                raise UserError(
                    f"rank{'s' * (len(missing) > 1)} {ranks_in_words(missing)}{f' ({where})' * bool(where)} did not "
                    f"answer {name!r} within {self._limit:.0f} s: look there for a message, or for a "
                    "process that hangs (py-spy dump --pid PID; kill -USR1 PID prints its stack)"
                )
            time.sleep(_POLL)
        return [json.loads(text) for text in self._store.multi_get(keys)]


def clock_offsets(board: Board, leaders: Sequence[Facts]) -> dict[str, float]:
    """Return, on rank 0, by how many seconds each machine's clock is ahead of its own; other ranks return {}.

    The other's time is compared with the middle between question and answer, as NTP does.
    """
    if board.rank > 0:
        if board.rank in [leader.rank for leader in leaders]:
            for turn in range(_ROUNDS):
                board.get(f"clock/{board.rank}/ask/{turn}")
                board.put(f"clock {turn}/{board.rank}", time.time())
        return {}
    offsets = {leaders[0].host: 0.0}
    for leader in leaders[1:]:
        found = []
        for turn in range(_ROUNDS):
            before, at = time.monotonic(), time.time()
            board.put(f"clock/{leader.rank}/ask/{turn}", 0)
            (answer,) = board.collect(f"clock {turn}", [leader.rank])
            took = time.monotonic() - before
            found.append((took, answer - (at + took / 2)))
        offsets[leader.host] = min(found)[1]
    return offsets


def clock_problems(offsets: Mapping[str, float]) -> list[str]:
    return [
        f"the clock of {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of "
        f"{next(iter(offsets))}: switch time synchronisation on (chrony, systemd-timesyncd)"
        for host, offset in offsets.items() if abs(offset) > _SKEW
    ]


def shared_storage_problems(board: Board, leaders: Sequence[Facts], folder: Path) -> list[str]:
    """Check whether ``folder`` is writable, and all machines see what one writes; only rank 0 returns problems.

    The leaders' files are removed again.
    """
    ranks = [leader.rank for leader in leaders]
    if board.rank not in ranks:
        return []
    own = folder / f".megavtp-doctor-{board.rank}-{secrets.token_hex(4)}"
    error = ""
    try:
        own.write_text(str(board.rank))
    except OSError as failure:
        error = failure.strerror or str(failure)
    try:
        board.put(f"storage/{board.rank}", {"file": str(own.absolute()), "error": error})
        if board.rank > 0:
            first = board.get(f"storage/{ranks[0]}")
            board.put(f"seen/{board.rank}", bool(first["error"]) or _appears(Path(first["file"])))
            board.get("storage done")
            return []
        written = board.collect("storage", ranks)
        found = [bool(entry["error"]) or _appears(Path(entry["file"])) for entry in written]
        seen = [True, *board.collect("seen", ranks[1:])]
        board.put("storage done", 0)
    finally:
        if not error:
            own.unlink(missing_ok=True)
    problems = []
    for leader, entry, sees_first, is_seen in zip(leaders, written, seen, found):
        if entry["error"]:
            problems.append(
                f"{leader.host} cannot write into {folder} ({entry['error']}): name with --shared the folder of the "
                "checkpoints, which must be there and be one that all machines can write to"
            )
        elif not (sees_first and is_seen):
            problems.append(
                f"{folder} is not the same folder on {leaders[0].host} and {leader.host}: checkpoints and data must be "
                "on a shared file system, under the same path (--shared names the folder here)"
            )
    return problems


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _VISIBLE
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def port_problems(board: Board, leaders: Sequence[Facts]) -> list[str]:
    """Check whether each machine can connect to each other, at a port of the system's choice; only rank 0 returns them.

    gloo and NCCL need this between all machines, not only towards rank 0.
    """
    ranks = [leader.rank for leader in leaders]
    if board.rank not in ranks:
        return []
    token = secrets.token_bytes(8)
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=_greet, args=(server, token), daemon=True).start()
        board.put(f"port/{board.rank}", {"port": server.getsockname()[1], "token": token.hex()})
        failed = {}
        for leader in leaders:
            if leader.rank != board.rank and leader.address is not None:
                there = board.get(f"port/{leader.rank}")
                if reason := _try(leader.address, there["port"], bytes.fromhex(there["token"])):
                    failed[leader.rank] = f"{leader.address}:{there['port']}: {reason}"
        board.put(f"connected/{board.rank}", failed)
        if board.rank > 0:
            board.get("ports done")
            return []
        everyone = board.collect("connected", ranks)
        board.put("ports done", 0)
    hosts = {str(leader.rank): leader.host for leader in leaders}
    return [
        f"{leader.host} cannot connect to {hosts[rank]} ({reason}): open all ports between the machines in the firewall"
        for leader, failures in zip(leaders, everyone) for rank, reason in failures.items()
    ]


def _greet(server: socket.socket, token: bytes) -> None:
    try:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(token)
    except OSError:
        pass  # the server is closed


def _try(address: str, port: int, token: bytes) -> str:
    """Return why there is no connection, or "" if there is one."""
    try:
        with socket.create_connection((address, port), _CONNECT) as connection:
            received = connection.makefile("rb").read(len(token))
    except OSError as error:
        return error.strerror or f"no answer within {_CONNECT:.0f} s"
    return "" if received == token else "somebody else answers there: two machines have this address"
