"""How the ranks find each other: a key-value store served by rank 0, or by torchrun, at which every rank checks in."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from megavtp.errors import UserError
from megavtp.launch.rendezvous import Place

_LONG = 30 * 86_400.0  # seconds, when there is no limit
_POLL = 0.1  # seconds


def meet(place: Place, timeout: float) -> dist.Store:
    """The store of the run, once all ranks have arrived.

    Args:
        timeout: seconds that the ranks may arrive one after another; 0 = no limit.

    Raises:
        UserError: the port is in use, rank 0 cannot be reached, or ranks are missing; it says which.
    """
    if place.world == 1:
        return dist.HashStore()
    limit = timeout or _LONG
    store = _connect(place, limit)
    store.set(f"arrived/{place.rank}", socket.gethostname())
    if place.rank == 0:
        store.set("missing", _missing(store, place.world, limit))
    else:
        store.wait(["missing"], timedelta(seconds=limit + 30))
    missing = store.get("missing").decode()
    if missing:
        raise UserError(missing)
    return store


def _connect(place: Place, limit: float) -> dist.Store:
    serves = place.rank == 0 and not place.agent_store
    try:
        store = dist.TCPStore(
            place.master_addr, place.master_port, place.world, serves, timedelta(seconds=limit), wait_for_workers=False
        )
    except RuntimeError as error:
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
    if place.agent_store:  # the agents use it, too, and start the ranks again in the same one
        return dist.PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _missing(store: dist.Store, world: int, limit: float) -> str:
    """Empty when all ranks have arrived, else what to say of those that have not."""
    deadline = time.monotonic() + limit
    waiting = list(range(world))
    while waiting and time.monotonic() < deadline:
        waiting = [rank for rank in waiting if not store.check([f"arrived/{rank}"])]
        time.sleep(_POLL if waiting else 0)
    if not waiting:
        return ""
    hosts = sorted({store.get(f"arrived/{rank}").decode() for rank in range(world) if rank not in set(waiting)})
    names = ", ".join(map(str, waiting[:16])) + (" and more" if len(waiting) > 16 else "")
    return (
        f"{len(waiting)} of {world} ranks did not arrive within {limit:.0f} s: {names}; those that did are on "
        f"{', '.join(hosts[:16])}: look for a message of the missing ones, on the machines that are not named here"
    )
