"""Gradients are averaged where they are: their means, over several ranks and one, and no copy of the large ones."""

from __future__ import annotations

import math
from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed import run_ranks
from operations import Operations
from torch import Tensor

from megavtp.parallel import reduce_in_place as module
from megavtp.parallel.mesh import build_mesh

SHAPES = [(4, 6), (7,), (40,), (3, 3), (5, 9)]
LARGE = 40  # two of them are


def gradients_of(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _averaged(rank: int) -> tuple[list[Tensor], int, list[Tensor]]:
    mesh = build_mesh(1, 1)
    gradients, alone = gradients_of(rank), gradients_of(rank)
    places = [gradient.data_ptr() for gradient in gradients]
    group = [dist.new_group([r]) for r in range(mesh.world_size)][rank]
    with patch.object(module, "LARGE", LARGE), Operations() as operations:
        module.average(gradients, mesh.group("dp"))
        module.average(alone, group)
    assert [gradient.data_ptr() for gradient in gradients] == places
    return gradients, sum(map(math.prod, operations.shapes["cat"])), alone


def test_means_where_the_gradients_are() -> None:
    found = run_ranks(3, _averaged, timeout=120)
    of_ranks = [gradients_of(rank) for rank in range(3)]
    for rank, (gradients, copied, alone) in enumerate(found):
        for gradient, parts in zip(gradients, zip(*of_ranks, strict=True), strict=True):
            torch.testing.assert_close(gradient, sum(parts) / 3)
        assert copied == sum(gradient.numel() for gradient in gradients if gradient.numel() < LARGE)
        for own, before in zip(alone, of_ranks[rank], strict=True):
            torch.testing.assert_close(own, before, rtol=0, atol=0)
