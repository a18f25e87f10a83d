"""Every launcher's environment gives the right rank, and contradictions are told in words."""

from __future__ import annotations

import pytest

from megavtp.errors import UserError
from megavtp.launch import rendezvous
from megavtp.launch.rendezvous import Member, detect, expand_counts, first_host, gloo_interface

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
DEEPSPEED = {  # as DeepSpeed 0.19.8 sets it for the second of two hosts with four devices each
    **MASTER, "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
TORCHRUN = {  # as torch 2.13 does
    **MASTER, "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {  # as SLURM 22.05 does
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_NODELIST": "gpu[03-05]",
}
BATCH = {  # of an sbatch script's own process, in a job of eight tasks
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_TASKS_PER_NODE": "4(x2)",
}
ALONE = Member("none", 0, 1, 0, 1, "127.0.0.1", 0)
SLURM_PORT = 10_000 + 4711 * 37 % 20_000


@pytest.mark.parametrize(
    "environment, member",
    [
        ({}, ALONE),
        (BATCH, ALONE),
        ({**BATCH, "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # a shell in an interactive step
        (DEEPSPEED, Member("deepspeed", 5, 8, 1, 4, "10.0.0.1", 29500)),
        (TORCHRUN, Member("torchrun", 5, 8, 1, 4, "10.0.0.1", 29500, agent_store=True)),
        ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}, Member("torchrun", 5, 8, 1, 4, "10.0.0.1", 29500)),
        (SRUN, Member("srun", 5, 8, 1, 4, "gpu03", SLURM_PORT)),
        ({**SRUN, **MASTER}, Member("srun", 5, 8, 1, 4, "10.0.0.1", 29500)),
        ({**SRUN, "SLURM_STEP_ID": "3"}, Member("srun", 5, 8, 1, 4, "gpu03", SLURM_PORT + 3)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "6,2"}, Member("srun", 5, 8, 1, 2, "gpu03", SLURM_PORT)),
        # one torchrun on each of two nodes, and the deepspeed launcher inside of a job
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}, Member("torchrun", 5, 8, 1, 4, "10.0.0.1", 29500, True)),
        ({**BATCH, **DEEPSPEED}, Member("deepspeed", 5, 8, 1, 4, "10.0.0.1", 29500)),
        ({**MASTER, "RANK": "1", "WORLD_SIZE": "2"}, Member("environment", 1, 2, 1, 2, "10.0.0.1", 29500)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Member("environment", 0, 1, 0, 1, "127.0.0.1", 0)),
        (
            {**SRUN, **MASTER, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Member("environment", 5, 8, 1, 4, "10.0.0.1", 29500),
        ),
    ],
)
def test_place(environment, member):
    assert detect(environment) == member


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE = 2 but MASTER_ADDR is not set"),
        ({**MASTER, "RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes"),
        ({**MASTER, "RANK": "one", "WORLD_SIZE": "2"}, "RANK = 'one' is not a number"),
        ({**DEEPSPEED, "LOCAL_RANK": "4"}, "local rank 4 of 4 processes on this machine"),
        ({**DEEPSPEED, "LOCAL_SIZE": "16"}, "16 processes on this machine, but 8 in all"),
        ({**DEEPSPEED, **TORCHRUN}, "start the ranks with one of them"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "srun made this process rank 5 of 8: unset RANK"),
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "srun started 8 tasks and each runs a torchrun of its own"),
        ({**SRUN, **DEEPSPEED, "CROSS_SIZE": "1"}, "srun started 8 tasks and each runs a deepspeed of its own"),
        ({k: v for k, v in SRUN.items() if "NODELIST" not in k}, "neither MASTER_ADDR nor SLURM_STEP_NODELIST"),
        ({**SRUN, "SLURM_NODEID": "7"}, "SLURM_NODEID = 7"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4*2"}, "SLURM_STEP_TASKS_PER_NODE = '4*2'"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
    ],
)
def test_contradictions(environment, message):
    with pytest.raises(UserError, match="(?s).*") as raised:
        detect(environment)
    assert message in str(raised.value)


def test_short_forms_of_slurm():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]
    hosts = {
        "vm": "vm", "a,b": "a", "gpu[003-006,9]": "gpu003", "gpu[7,9-12]-ib,login1": "gpu7-ib",
        "r[1-2]n[05-20],x": "r1n05", "node-a.cluster.org,b": "node-a.cluster.org",
    }
    assert {short: first_host(short) for short in hosts} == hosts


def test_ports_differ_between_jobs_and_steps_side_by_side():
    ports = {rendezvous._port(job, step) for job in range(1000, 1200) for step in range(30)}
    assert len(ports) == 200 * 30 and min(ports) >= 10_000 and max(ports) < 30_000


def test_gloo_is_not_led_to_a_loopback_address(monkeypatch):
    """On the master its own name is often 127.0.1.1: the other machines could not connect to that."""
    routes = {"gpu03": "127.0.0.1", rendezvous._ELSEWHERE: "10.0.0.3", "10.0.0.1": "10.1.0.3", "nowhere": None}
    monkeypatch.setattr(rendezvous, "_address_towards", routes.get)
    address = type("Address", (), {})
    cards = {"lo": "127.0.0.1", "eth0": "10.0.0.3", "ib0": "10.1.0.3"}
    found = {}
    for name, own in cards.items():
        found[name] = [address()]
        found[name][0].address = own
    monkeypatch.setattr(rendezvous.psutil, "net_if_addrs", lambda: found)

    def member(master: str, local: int) -> Member:
        return Member("srun", 0, 8, 0, local, master, 1)

    assert gloo_interface(member("10.0.0.1", 4)) == "ib0"
    assert gloo_interface(member("gpu03", 4)) == "eth0"
    assert gloo_interface(member("gpu03", 8)) is None  # one machine: as gloo does by itself
    assert gloo_interface(member("nowhere", 8)) is None
