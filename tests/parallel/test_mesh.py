"""Coordinates and groups of every rank, for several meshes on one world of eight and one of four."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from megavtp.parallel.collectives import all_gather_object
from megavtp.parallel.mesh import SINGLE, build_mesh

AXES = ("tp", "pp", "dp", "mp")
SPLITS = {4: [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)], 8: [(2, 2), (2, 1), (1, 4)]}


def on_ranks(rank: int, world: int) -> list[tuple]:
    """Per mesh: sizes, coordinates, rank, and the world ranks of each group as torch has them and as they answer."""
    found = []
    for tp, pp in SPLITS[world]:
        mesh = build_mesh(tp, pp)
        members, answers = {}, {}
        for axis in AXES:
            group = mesh.group(axis)
            members[axis] = None if group is None else dist.get_process_group_ranks(group)
            if group is not None:
                answers[axis] = [None] * mesh.size(axis)
                dist.all_gather_object(answers[axis], rank, group=group)
        found.append((
            (mesh.tp, mesh.pp, mesh.dp, mesh.world_size), (mesh.tp_rank, mesh.pp_rank, mesh.dp_rank), mesh.rank,
            members, answers,
        ))
        assert all_gather_object(rank) == list(range(world))
    return found


def _are_peers(axis: str, one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Whether two ranks at (dp, pp, tp) differ in nothing but the axis."""
    fixed = {"tp": (0, 1), "pp": (0, 2), "dp": (1, 2), "mp": (0,)}[axis]
    return all(one[i] == other[i] for i in fixed)


@pytest.mark.parametrize("world", [4, 8])
def test_mesh(world: int) -> None:
    ranks = run_ranks(world, on_ranks, world)
    for number, (tp, pp) in enumerate(SPLITS[world]):
        dp = world // tp // pp
        expected = list(itertools.product(range(dp), range(pp), range(tp)))  # tp fastest, dp slowest
        by_rank = [results[number] for results in ranks]
        for rank, (sizes, (t, p, d), own, members, answers) in enumerate(by_rank):
            assert sizes == (tp, pp, dp, world)
            assert (d, p, t) == expected[rank] and own == rank == (d * pp + p) * tp + t
            for axis in AXES:
                peers = [r for r, other in enumerate(expected) if _are_peers(axis, expected[rank], other)]
                assert members[axis] == (peers if len(peers) > 1 else None), axis
                assert answers.get(axis, [rank]) == peers, axis


def test_one_process_has_no_groups() -> None:
    mesh = build_mesh(1, 1)
    assert mesh == SINGLE and mesh.rank == 0 and mesh.world_size == 1
    assert all(mesh.group(axis) is None and mesh.size(axis) == 1 for axis in AXES)


def _limit(rank: int) -> float:
    group = build_mesh(1, 1, timeout=timedelta(seconds=77)).dp_group
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_the_groups_have_the_limit_that_is_given():
    assert run_ranks(2, _limit) == [77.0, 77.0]
