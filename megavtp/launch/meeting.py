"""The ranks find each other at a key-value store, served by rank 0 or by torchrun, where every rank checks in."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from megavtp.errors import UserError
from megavtp.launch.rendezvous import Place
from megavtp.launch.verdict import REPORTS, load_report, own_report

_LONG = 30 * 86_400.0  # seconds, when there is no limit
_POLL = 0.1  # seconds
_CONNECTS = 5.0  # seconds that a connection may take
_READING = 0.5  # seconds for the others to read what rank 0 says
_GRACE = 5.0  # seconds for rank 0 to speak first


def meet(place: Place, timeout: float) -> dist.Store:
    """Return the store of the run, once all ranks have arrived. It holds a first report of each rank.

    Args:
        timeout: seconds between the arrival of the first rank and the last; 0 = no limit.

    Raises:
        UserError: the port is in use, rank 0 cannot be reached or has gone, or ranks are missing; it says which.
    """
    limit = timeout or _LONG
    deadline = time.monotonic() + limit
    store = dist.HashStore() if place.world == 1 else _connect(place, limit, deadline)
    store.set(f"{REPORTS}/{place.rank}", own_report(socket.gethostname()).dump())
    missing = ""
    if place.world > 1 and place.rank == 0:
        missing = _missing(store, place.world, limit, deadline)
        store.set("missing", missing)
        time.sleep(_READING if missing else 0)  # it serves the store
    elif place.world > 1:
        missing = _told(store, place, limit, deadline)
    if missing:
        raise UserError(missing)
    return store


def _wait_for_server(place: Place, deadline: float) -> None:
    """Wait until a process listens there. ``TCPStore`` itself would wait for two or three times its timeout."""
    while True:
        try:
            socket.create_connection((place.master_addr, place.master_port), timeout=_CONNECTS).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL)


def _told(store: dist.Store, place: Place, limit: float, deadline: float) -> str:
    """Return what rank 0 says of the missing ranks. If it has come later than this rank, it may wait for longer."""
    try:
        try:
            store.wait(["missing"], timedelta(seconds=max(0.0, deadline - time.monotonic()) + _GRACE))
        except dist.DistStoreError:
            return _missing(store, place.world, limit, deadline)
        return store.get("missing").decode()
    except RuntimeError as error:
        raise UserError(
            f"rank 0 at {place.master_addr}:{place.master_port} has gone before all ranks had met (killed?): look for "
            f"its message there [rank {place.rank} of {place.world}: {str(error).splitlines()[0]}]"
        ) from None


def _connect(place: Place, limit: float, deadline: float) -> dist.Store:
    serves = place.rank == 0 and not place.agent_store
    try:
        if not serves:
            _wait_for_server(place, deadline)
        store = dist.TCPStore(
            place.master_addr, place.master_port, place.world, serves, timedelta(seconds=limit), wait_for_workers=False
        )
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise UserError(
                f"port {place.master_port} is in use on {socket.gethostname()}, perhaps by another run: give another "
                "one (deepspeed --master_port N, torchrun --master_port N, MASTER_PORT=N with srun)"
            ) from None
        raise UserError(
            f"rank {place.rank} of {place.world} on {socket.gethostname()} could not reach rank 0 at "
            f"{place.master_addr}:{place.master_port} within {limit:.0f} s: see that rank 0 was started, that this "
            f"machine resolves the name {place.master_addr}, and that no firewall closes the port [{reason}]"
        ) from None
    if place.agent_store:  # the agents use this store, too, and restarted ranks get the same one
        return dist.PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _missing(store: dist.Store, world: int, limit: float, deadline: float) -> str:
    """Return "" when all ranks have arrived, or else a message about those that have not by the deadline."""
    waiting = list(range(world))
    while waiting := [rank for rank in waiting if not store.check([f"{REPORTS}/{rank}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL)
    if not waiting:
        return ""
    arrived = [f"{REPORTS}/{rank}" for rank in range(world) if rank not in set(waiting)]
    hosts = sorted({load_report(text).host for text in store.multi_get(arrived)})
    names = ", ".join(map(str, waiting[:16])) + (" and more" if len(waiting) > 16 else "")
    return (
        f"{len(waiting)} of {world} ranks did not arrive within {limit:.0f} s: {names}; those that did are on "
        f"{', '.join(hosts[:16])}: look for a message of the missing ones, on the machines that are not named here"
    )
