"""The ranks find each other at a key-value store, served by rank 0 or by torchrun, where every rank checks in."""

import os
import socket
import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from megavtp.errors import UserError
from megavtp.launch.rendezvous import Member
from megavtp.launch.verdict import REPORTS, Report, own_report

NO_LIMIT = 30 * 86_400.0  # seconds that stand for no limit
_POLL = 0.1  # seconds
_CONNECTS = 5.0  # seconds that a connection may take
_READING = 0.5  # seconds for the others to read what rank 0 says
_GRACE = 5.0  # seconds for rank 0 to speak first


def meet(member: Member, timeout: float) -> dist.Store:
    """Return the store of the run, once all ranks have arrived. It holds a first report of each rank.

    Args:
        timeout: seconds between the arrival of the first rank and the last; 0 = no limit.

    Raises:
        UserError: the port is in use, rank 0 cannot be reached or has gone, or ranks are missing; it says which.
    """
    limit = timeout or NO_LIMIT
    deadline = time.monotonic() + limit
    store = dist.HashStore() if member.world == 1 else _connect(member, limit, deadline)
    store.set(f"{REPORTS}/{member.rank}", own_report(socket.gethostname()).dump())
    if member.world == 1:
        return store
    if member.rank == 0:
        missing = _missing(store, member.world, limit, deadline)
        store.set("missing", missing)
        time.sleep(_READING if missing else 0)  # it serves the store
    else:
        missing = _told(store, member, limit, deadline)
    if missing:
        raise UserError(missing)
    return store


def _told(store: dist.Store, member: Member, limit: float, deadline: float) -> str:
    """Return what rank 0 says of the missing ranks. If it has come later than this rank, it may wait for longer."""
    try:
        try:
            store.wait(["missing"], timedelta(seconds=max(0.0, deadline - time.monotonic()) + _GRACE))
        except dist.DistStoreError:
            return _missing(store, member.world, limit, deadline)
        return store.get("missing").decode()
    except RuntimeError as error:
        raise UserError(
            f"rank 0 at {member.master} has gone before all ranks had met (killed?): look for its message there "
            f"[rank {member.rank} of {member.world}: {str(error).splitlines()[0]}]"
        ) from None


def _connect(member: Member, limit: float, deadline: float) -> dist.Store:
    address, port = member.master_addr, member.master_port
    serves = member.rank == 0 and not member.agent_store
    try:
        while not serves:  # until somebody listens there: TCPStore itself would wait for two or three times its timeout
            try:
                socket.create_connection((address, port), timeout=_CONNECTS).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL)
        store = dist.TCPStore(address, port, member.world, serves, timedelta(seconds=limit), wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise UserError(
                f"port {port} is in use on {socket.gethostname()}, perhaps by another run: give another one "
                "(deepspeed --master_port N, torchrun --master_port N, MASTER_PORT=N with srun)"
            ) from None
        raise UserError(
            f"rank {member.rank} of {member.world} on {socket.gethostname()} could not reach rank 0 at "
            f"{member.master} within {limit:.0f} s: see that rank 0 was started, that this machine resolves the name "
            f"{address}, and that no firewall closes the port [{reason}]"
        ) from None
    if member.agent_store:  # the agents use this store, too, and restarted ranks get the same one
        return dist.PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _missing(store: dist.Store, world: int, limit: float, deadline: float) -> str:
    """Return "" when all ranks have arrived, or else a message about those that have not by the deadline."""
    missing = await_ranks(store, REPORTS, range(world), deadline, _POLL)
    if not missing:
        return ""
    arrived = [f"{REPORTS}/{rank}" for rank in sorted(set(range(world)) - set(missing))]
    hosts = sorted({Report.load(text).host for text in store.multi_get(arrived)})
    names = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
    return (
        f"{len(missing)} of {world} ranks did not arrive within {limit:.0f} s: {names}; those that did are on "
        f"{', '.join(hosts[:16])}: look for a message of the missing ones, on the machines that are not named here"
    )


def await_ranks(store: dist.Store, name: str, ranks: Iterable[int], deadline: float, poll: float) -> list[int]:
    """Wait until ``ranks`` have put ``name/RANK`` into the store; return those that have not by the deadline."""
    missing = list(ranks)
    while missing := [rank for rank in missing if not store.check([f"{name}/{rank}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(poll)
    return missing
