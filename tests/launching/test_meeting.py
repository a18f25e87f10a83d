"""Ranks that do not come, or go before all have met, are named within the limit, without a launcher's help."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from distributed import free_port

from megavtp.errors import UserError
from megavtp.launch import meeting
from megavtp.launch.meeting import meet
from megavtp.launch.rendezvous import Member

pytestmark = pytest.mark.timeout(60)


def member(rank: int, world: int, port: int) -> Member:
    return Member("environment", rank, world, rank, world, "127.0.0.1", port)


def outcome(rank: int, world: int, port: int, timeout: float) -> str:
    try:
        meet(member(rank, world, port), timeout)
    except UserError as error:
        return str(error)
    return "met"


def test_all_meet():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: meet(member(rank, 3, port), 30), range(3)))
    for store in (*stores, meet(member(0, 1, 0), 30)):
        assert store.check(["watch/0"])


def test_rank_0_does_not_come():
    start = time.monotonic()
    assert "rank 1 of 2 on " in (told := outcome(1, 2, free_port(), 2)) and "could not reach rank 0" in told
    assert time.monotonic() - start < 4


def test_another_rank_does_not_come():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        for told in pool.map(lambda rank: outcome(rank, 3, port, 1), range(2)):
            assert told.startswith("1 of 3 ranks did not arrive within 1 s: 2; those that did are on "), told


def test_who_came_first_does_not_wait_as_long_as_rank_0_which_came_later(monkeypatch):
    monkeypatch.setattr(meeting, "_GRACE", 0.2)
    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, 3, True, timedelta(seconds=30), wait_for_workers=False)
    server.set("watch/0", '{"host": "node0", "phase": "", "number": 0, "slow": true, "age": 0.0, "broken": false, '
                          '"at": "", "in_collective": false}')
    told = outcome(1, 3, port, 1)
    assert told.startswith("1 of 3 ranks did not arrive within 1 s: 2; those that did are on "), told


def test_rank_0_goes_before_all_have_met():
    port = free_port()
    servers = [dist.TCPStore("127.0.0.1", port, 3, True, timedelta(seconds=30), wait_for_workers=False)]
    threading.Timer(0.5, servers.clear).start()
    told = outcome(1, 3, port, 30)
    assert told.startswith(f"rank 0 at 127.0.0.1:{port} has gone before all ranks had met (killed?)"), told
