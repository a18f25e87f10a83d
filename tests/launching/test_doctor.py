"""What the doctor says of machines that do not fit together; nobody who does not answer keeps it waiting."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch.distributed as dist
from launched import Ranks

from megavtp.errors import UserError
from megavtp.launch import ranks
from megavtp.launch.doctor import check, machine
from megavtp.launch.doctor.bandwidth import Link, rounds, slow_links
from megavtp.launch.doctor.machine import Facts, compare, ranks_in_words
from megavtp.launch.doctor.network import Board, _greet, _try, clock_problems
from megavtp.parallel.deepspeed_adapter import SUPPORTED_VERSION

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": SUPPORTED_VERSION, "megavtp": "ab", "GPU driver": ""}
MACHINES = [  # two ranks on each of two machines
    Facts(f"host-{'ab'[rank // 2]}", rank, rank % 2, f"10.0.0.{rank // 2}", "H100", 2, VERSIONS, {}, 2**30)
    for rank in range(4)
]


def changed(*ranks: int, **fields) -> list[Facts]:
    return [replace(fact, **fields) if fact.rank in ranks else fact for fact in MACHINES]


def test_nothing_is_wrong_with_equal_machines():
    assert compare(MACHINES) == []


@pytest.mark.parametrize(
    "facts, problem",
    [
        (
            changed(2, 3, versions=VERSIONS | {"torch": "2.11.0"}),
            "torch differs: 2.13.0 on ranks 0-1 (host-a); 2.11.0 on ranks 2-3 (host-b): install the same version",
        ),
        (changed(3, versions=VERSIONS | {"megavtp": "cd"}), "megavtp differs: ab on ranks 0-2 (host-a, host-b); cd"),
        (changed(0, 1, 2, 3, versions=VERSIONS | {"deepspeed": "0.1"}), "deepspeed is 0.1: pip install deepspeed=="),
        (changed(2, 3, device="A100"), "the device differs: H100 on ranks 0-1 (host-a); A100 on ranks 2-3 (host-b)"),
        (
            changed(0, settings={"NCCL_SOCKET_IFNAME": "ib0"}),
            "NCCL_SOCKET_IFNAME differs: ib0 on rank 0 (host-a); not set on ranks 1-3 (host-a, host-b)",
        ),
        (changed(1, local_rank=0), "host-a: local ranks [0, 0] are not all different"),
        (changed(0, 1, 2, 3, host="host-a"), "two machines have the same name"),
        (changed(2, 3, address=None), "host-b: no address at which the other machines could reach it"),
        (changed(2, 3, shared_memory=64 * 2**20), "host-b: /dev/shm has 64 MiB free for 2 ranks"),
    ],
)
def test_what_differs_is_told_with_a_remedy(facts, problem):
    assert any(problem in text for text in compare(facts)), compare(facts)


def test_clocks():
    assert clock_problems({"a": 0.0, "b": 0.4, "c": -0.9}) == []
    assert clock_problems({"a": 0.0, "b": -3.0}) == [
        "the clock of b is 3.0 s behind that of a: switch time synchronisation on (chrony, systemd-timesyncd)"
    ]


def test_ranks_in_words():
    assert ranks_in_words([5, 0, 1, 2]) == "0-2, 5" and ranks_in_words([7]) == "7"


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_every_pair_has_a_round_and_no_rank_is_in_two(count):
    members = list(range(10, 10 + count))
    found = rounds(members)
    assert sorted(p for round_ in found for p in round_) == [(a, b) for a in members for b in members if a < b]
    for round_ in found:
        busy = [rank for pair in round_ for rank in pair]
        assert len(busy) == len(set(busy))
    assert len(found) == count - 1 + count % 2
    assert rounds([3]) == []


def test_a_link_is_slow_among_others_of_its_kind():
    assert slow_links([Link(0, 1, 1e9), Link(0, 2, 1e6)]) == []
    links = [Link(0, 1, 9e9), Link(0, 2, 2e9), Link(1, 2, 10e9)]
    assert slow_links(links) == [links[1]]


def test_a_closed_port_and_a_stranger_are_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "refused" in _try("127.0.0.1", port, b"token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_greet, args=(server, b"token"), daemon=True).start()
        assert _try("127.0.0.1", server.getsockname()[1], b"token") == ""
        assert "somebody else answers" in _try("127.0.0.1", server.getsockname()[1], b"other")


def test_who_does_not_answer_is_named_in_time():
    board = Board(dist.HashStore(), 0, 2, 0.5)
    board.hosts = {0: "host-a", 1: "host-b"}
    board.put("clock 0/0", 1.5)
    assert board.collect("clock 0", [0]) == [1.5]
    start = time.monotonic()
    with pytest.raises(UserError, match=r"rank 1 \(host-b\) did not answer 'clock 0' within 0 s"):
        board.collect("clock 0", [0, 1])
    assert time.monotonic() - start < 5


def test_the_facts_of_a_rank_come_over_the_board():
    (fields,) = Board(dist.HashStore(), 0, 1, 0.5).share("facts", vars(MACHINES[3]))
    assert Facts(**fields) == MACHINES[3]


def test_the_folder_of_a_single_machine(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for folder, problem in (("none", "No such file or directory"), ("file", "Not a directory"), (".", None)):
        monkeypatch.setattr(sys, "argv", ["doctor.py", "--shared", str(tmp_path / folder)])
        status, said = check.main(), capsys.readouterr().out
        if problem:
            told = re.escape(f"cannot write into {tmp_path / folder} ({problem}): name with --shared")
            assert status == 1 and "WRONG  storage: see below" in said and re.search(told, said), said
        else:
            assert f"ok     storage: {tmp_path} can be written to" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _examine(fault: str, rank: int) -> None:
    """Never returns."""
    sys.argv = ["doctor", "--timeout", "4", "--megabytes", "1"]
    if rank == 1 and fault == "other version":
        versions = machine._versions
        machine._versions = lambda gpu: versions(gpu) | {"numpy": "1.0"}
    if rank == 1 and fault == "hangs":
        check.gather_facts = lambda member: time.sleep(600)
    if rank == 1 and fault == "hangs in a collective":
        check.bandwidth.links = lambda *arguments: time.sleep(600)
    ranks.run_ranks(check.main)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("other version", r"1\. numpy differs: \S+ on ranks 0, 2 \(\S+\); 1\.0 on rank 1 "),
        ("hangs", r"error: rank 1 did not answer 'facts' within 4 s"),
        ("hangs in a collective", r"rank 1 \(\S+\) hangs: no progress for \d+ s .* in all-reduce of 1 MiB over"),
    ],
)
def test_ranks(fault, said, tmp_path):
    with Ranks([], 3, tmp_path, partial(_examine, fault)) as ranks:
        if fault == "hangs":  # nothing ends it here: it has not joined, and there is no launcher
            for process in (ranks.processes[0], ranks.processes[2]):
                process.join(60)
            assert [process.exitcode for process in ranks.processes] == [2, None, 2]
        else:
            assert ranks.wait(60) == [1, 1, 1]
        assert re.search(said, ranks.output), ranks.output
    assert "Traceback" not in ranks.output
