"""A DiT whose samples' tokens are cut over tensor-parallel ranks: equal to one process, and what it holds."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from operations import Operations
from torch import Tensor
from whole_gradients import whole_gradients

from megavtp.dit.config import DiTModelConfig
from megavtp.dit.model.build import build_dit
from megavtp.dit.model.model import DiT
from megavtp.dit.model.positions import pair_table
from megavtp.models.init import constant, fill_parameters, normal
from megavtp.nn.rope import packed_table
from megavtp.parallel.collectives import all_gather
from megavtp.parallel.mesh import SINGLE, Mesh, build_mesh
from megavtp.parallel.sequence import TokenCut

MODES = ("none", "selective", "full")
SAMPLES = 3
_VALUES = [(r".*norm\w*\.weight", constant(1.2)), (r".*", normal(0.3))]  # nothing at zero, as after training


def tiny(mesh: Mesh, mode: str, side: int = 3) -> DiT:
    """``side`` x ``side`` tokens: 9 of them neither 2 nor 4 divides."""
    config = DiTModelConfig(
        width=48, depth=2, heads=4, patch_size=2, qk_norm=True, latent_size=2 * side, latent_channels=4, num_classes=5
    )
    model = build_dit(config, mesh)
    model.recompute = mode
    fill_parameters(model.named_parameters(), _VALUES, mesh, 5)
    return model


def evaluate(mesh: Mesh, mode: str) -> dict[str, Tensor]:
    """Velocity and all gradients, whole."""
    model = tiny(mesh, mode)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, 6, 6, generator=generator).requires_grad_()
    velocity = model(x, torch.rand(SAMPLES, generator=generator), torch.arange(SAMPLES))
    (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
    found = {"velocity": velocity.detach(), "x": x.grad}
    return found | whole_gradients(model, mesh)


def held(mesh: Mesh, mode: str) -> float:
    """Bytes per token that a block makes and leaves to its backward, its input included, its rotary table not."""
    bytes_of, samples = [], 2
    for side in (4, 8):
        model = tiny(mesh, mode, side)
        block, table = model.blocks["0"], packed_table([pair_table(*model.feat_rope.buffers())], [(samples, side**2)])
        cut = TokenCut(mesh, samples * side**2, sequences=samples) if mesh.sequence_parallel else None
        leaf = torch.randn(samples, side**2 // mesh.tp, 48, requires_grad=True)
        condition = torch.randn(samples, 48, requires_grad=True)
        with Operations() as operations:
            y = block(leaf * 1, condition * 1, table, cut, mode)
        bytes_of.append(operations.settled_bytes() - y.untyped_storage().nbytes() - sum(part.nbytes for part in table))
    return (bytes_of[1] - bytes_of[0]) / (samples * (8**2 - 4**2))


def pieces(mesh: Mesh, total: int, sequences: int) -> list[Tensor]:
    """A tensor whose values say where they come from, cut and put together again in the ways there are."""
    x = torch.arange(total * 2.0).view(total, 2)
    cut = TokenCut(mesh, total, sequences=sequences)
    own = cut.split(x)
    return [own, cut.join(own), cut.gather(own), all_gather(cut.reduce(x), mesh, "tp")]


PIECES = [(6, 1), (7, 1), (12, 3), (15, 3), (3, 3), (0, 1)]


def on_rank(rank: int) -> dict:
    results: dict = {}
    for tp in (2, 4):
        mesh = build_mesh(tp, 1, sequence_parallel=True)
        results[tp] = {mode: evaluate(mesh, mode) for mode in MODES}
        results[tp]["held"] = {mode: held(mesh, mode) for mode in MODES[:2]}
        results[tp]["pieces"] = {key: pieces(mesh, *key) for key in PIECES}
        results[tp]["rank"] = mesh.tp_rank
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(4, on_rank)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_equals_one_process(mode: str, tp: int, ranks: list[dict]) -> None:
    expected = evaluate(SINGLE, "none")
    for results in ranks:
        found = results[tp][mode]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("tp", [2, 4])
def test_every_activation_is_cut(tp: int, ranks: list[dict]) -> None:
    for mode in MODES[:2]:
        expected = held(SINGLE, mode) / tp
        assert expected > 48 * 4 and all(results[tp]["held"][mode] == expected for results in ranks)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("total, sequences", PIECES)
def test_each_sequence_is_cut(total: int, sequences: int, tp: int, ranks: list[dict]) -> None:
    x = torch.arange(total * 2.0).view(total, 2)
    length = total // sequences
    share = -(-length // tp)
    for results in ranks:
        own, joined, gathered, reduced = results[tp]["pieces"][total, sequences]
        padded = torch.zeros(sequences, share * tp, 2)
        padded[:, :length] = x.view(sequences, length, 2)
        parts = padded.view(sequences, tp, share, 2).transpose(0, 1).flatten(1, 2)  # by rank
        assert torch.equal(own, parts[results[tp]["rank"]])
        assert torch.equal(joined, x) and torch.equal(gathered, x)
        assert torch.equal(reduced, tp * parts.flatten(0, 1))  # a summand from each rank
