"""Tensor-parallel layers and collectives equal their plain counterparts, values and gradients, on 2 and 4 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from torch import Tensor, nn

from megavtp.parallel.collectives import (
    all_gather,
    all_gather_object,
    all_reduce,
    broadcast_object,
    copy_to_tp,
    gather_from_dp,
    reduce_from_tp,
    scatter_to_tp,
)
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megavtp.parallel.mesh import SINGLE, Mesh, build_mesh
from megavtp.parallel.sharding import Shard, cut, merge, shard_of

IN, OUT, ROWS, VOCABULARY = 12, 24, 5, 16
LAYERS = {
    "column": lambda mesh: ColumnParallelLinear(IN, OUT, mesh=mesh),
    "column, fused": lambda mesh: ColumnParallelLinear(IN, OUT, mesh=mesh, parts=3),
    "column, no bias": lambda mesh: ColumnParallelLinear(IN, OUT, bias=False, mesh=mesh),
    "column, input copied by the caller": lambda mesh: ColumnParallelLinear(IN, OUT, mesh=mesh, copy_input=False),
    "row": lambda mesh: RowParallelLinear(IN, OUT, mesh=mesh),
    "row, no bias": lambda mesh: RowParallelLinear(IN, OUT, bias=False, mesh=mesh),
    "row, whole input": lambda mesh: RowParallelLinear(IN, OUT, mesh=mesh, input_is_parallel=False),
    "embedding": lambda mesh: VocabParallelEmbedding(VOCABULARY, OUT, mesh=mesh),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(layer: nn.Module, mesh: Mesh) -> None:
    for seed, parameter in enumerate(layer.parameters()):
        shape, shard = list(parameter.shape), shard_of(parameter)
        if shard is not None:
            shape[shard.dim] *= mesh.tp
        parameter.data = cut(random(*shape, seed=seed), shard, mesh.tp_rank, mesh.tp).contiguous()


def whole(x: Tensor, shard: Shard | None, mesh: Mesh) -> Tensor:
    """All ranks' pieces put together."""
    return x if shard is None else merge(all_gather(x[None], mesh, "tp").unbind(), shard)


def evaluate(name: str, mesh: Mesh) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients of a layer, all whole."""
    layer = LAYERS[name](mesh)
    fill(layer, mesh)
    fused = Shard(-1, 3 if "fused" in name else 1)
    if name == "embedding":
        ids = torch.arange(2 * VOCABULARY).view(2, -1) * 5 % VOCABULARY
        y, x = layer(ids), None
    else:
        x = random(ROWS, IN, seed=10).requires_grad_()
        given = x
        if "caller" in name:
            given = copy_to_tp(x, mesh)
        elif name.startswith("row") and "whole" not in name:
            given = scatter_to_tp(x, mesh)
        y = layer(given)
    column = name.startswith("column")
    # Each rank's loss sees its own columns of a cut output, and all of a whole one.
    weight = random(ROWS if x is not None else 2 * VOCABULARY, OUT, seed=11).view(*y.shape[:-1], OUT)
    (y * cut(weight, fused if column else None, mesh.tp_rank, mesh.tp)).sum().backward()
    result = {"y": whole(y.detach(), fused if column else None, mesh)}
    if x is not None:
        result["x"] = x.grad
    for key, parameter in layer.named_parameters():
        result[key] = whole(parameter.grad, shard_of(parameter), mesh)
    return result


def evaluate_collectives(mesh: Mesh) -> None:
    """Values and gradients of the collectives against what they stand for. tp is the whole world, then dp is."""
    rank, size = mesh.rank, mesh.world_size
    axis = "tp" if mesh.tp > 1 else "dp"
    own = [random(3, 2 * size, seed=rank) for rank in range(size)]
    assert torch.allclose(all_reduce(own[rank], mesh, axis), torch.stack(own).sum(0))
    assert torch.equal(all_reduce(own[rank], mesh, axis, "max"), torch.stack(own).amax(0))
    assert torch.equal(all_gather(own[rank].t(), mesh, axis), torch.cat([x.t() for x in own]))
    for other in ("tp", "pp", "dp", "mp"):
        if mesh.size(other) == 1:
            assert torch.equal(all_reduce(own[rank], mesh, other), own[rank])
            assert torch.equal(all_gather(own[rank], mesh, other), own[rank])
    before = own[rank].clone()
    gradients = [random(3, 2 * size, seed=50 + rank) for rank in range(size)]
    x = own[rank].requires_grad_()
    if axis == "tp":
        for function, value, gradient in (
            (copy_to_tp, before, torch.stack(gradients).sum(0)),
            (reduce_from_tp, torch.stack([o.detach() for o in own]).sum(0), gradients[rank]),
        ):
            x.grad = None
            y = function(x, mesh)
            y.backward(gradients[rank])
            assert torch.allclose(y, value) and torch.allclose(x.grad, gradient), function.__name__
        x.grad = None
        y = scatter_to_tp(x, mesh)
        y.backward(gradients[rank][:, :2])
        assert torch.equal(y, before[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(x.grad, torch.cat([g[:, :2] for g in gradients], -1))
    else:
        y = gather_from_dp(x, mesh)
        upstream = [random(3 * size, 2 * size, seed=90 + rank) for rank in range(size)]
        y.backward(upstream[rank])
        assert torch.equal(y, torch.cat([o.detach() for o in own]))
        assert torch.allclose(x.grad, torch.stack(upstream).sum(0)[3 * rank : 3 * rank + 3])
    assert torch.equal(x, before)  # none works in place
    assert broadcast_object({"rank": rank}) == {"rank": 0}
    assert all_gather_object(rank) == list(range(size))


def on_ranks(rank: int) -> list[dict[str, dict[str, Tensor]]]:
    """Four ranks: tp 2 (twice over), tp 4."""
    results = []
    for tp in (2, 4):
        mesh = build_mesh(tp, 1)
        results.append({name: evaluate(name, mesh) for name in LAYERS})
    evaluate_collectives(build_mesh(4, 1))
    evaluate_collectives(build_mesh(1, 1))
    return results


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, dict[str, Tensor]]]]:
    return run_ranks(4, on_ranks)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_plain_one(name: str, tp: int, ranks: list) -> None:
    expected = evaluate(name, SINGLE)
    for results in ranks:
        found = results[(2, 4).index(tp)][name]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-12, atol=1e-12), key


def test_one_process_is_plain_torch() -> None:
    """With tp 1 the layers are torch's own, bit for bit, and the collectives the identity."""
    x = random(ROWS, IN, seed=3)
    for name in ("column", "row"):
        layer = LAYERS[name](SINGLE)
        fill(layer, SINGLE)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    for function in (copy_to_tp, reduce_from_tp, scatter_to_tp, gather_from_dp):
        assert function(x, SINGLE) is x
    assert broadcast_object(3) == 3 and all_gather_object(3) == [3]


def test_layers_that_share_an_input_can_share_its_reduction(ranks: list) -> None:
    """``copy_input=False`` leaves out a reduction that the caller makes: same result as the layer's own."""
    for results in ranks:
        for found in results:
            for key, value in found["column"].items():
                assert torch.equal(found["column, input copied by the caller"][key], value)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shard", [None, Shard(0), Shard(1), Shard(-1), Shard(0, 3), Shard(1, 2), Shard(2, 3)])
def test_merge_undoes_cut(shard: Shard | None, size: int) -> None:
    full = random(36, 24, 36, seed=0)
    pieces = [cut(full, shard, rank, size) for rank in range(size)]
    assert torch.equal(merge(pieces, shard), full)
    if shard is not None:
        assert all(piece.numel() * size == full.numel() for piece in pieces)


def test_a_fused_weight_is_cut_part_by_part() -> None:
    """Each rank holds its heads of q, of k and of v."""
    full = torch.arange(12.0)
    assert cut(full, Shard(0, 3), 0, 2).tolist() == [0, 1, 4, 5, 8, 9]
    assert cut(full, Shard(0, 3), 1, 2).tolist() == [2, 3, 6, 7, 10, 11]
    assert cut(full, Shard(0), 1, 2).tolist() == [6, 7, 8, 9, 10, 11]
