"""Blocks whose tokens are cut over tensor-parallel ranks: equal to one process, and what they hold and send."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from operations import Operations
from torch import Tensor, nn
from whole_gradients import whole_gradients

from megavtp.nn.attention import Attention
from megavtp.nn.block import Block, run_blocks
from megavtp.nn.drop_path import DropPlan, draw_drop_plan
from megavtp.nn.feed_forward import MLP, SwiGLU
from megavtp.nn.norms import LayerNorm, RMSNorm
from megavtp.nn.rope import AxialRope
from megavtp.parallel.mesh import SINGLE, Mesh, build_mesh
from megavtp.parallel.sharding import cut, shard_of
from megavtp.parallel.traffic import count_traffic

WIDTH, HEADS, HIDDEN, DEPTH = 32, 4, 48, 2
MODES = ("none", "selective", "full")
# Segments: 62 tokens in two crop sizes, 21 in one, and fewer tokens than ranks. Neither 2 nor 4 divides them all.
CASES = {
    "vision": {"segments": ((4, 10), (11, 2)), "sides": ((3, 3), (1, 1)), "swiglu": True, "drop": 0.4},
    "text": {"segments": ((3, 7),), "swiglu": False, "drop": 0.0},
    "three tokens": {"segments": ((3, 1),), "swiglu": False, "drop": 0.5},
    "even": {"segments": ((4, 8),), "swiglu": True, "drop": 0.0},
}


def stack(mesh: Mesh, swiglu: bool, dtype: torch.dtype) -> nn.ModuleDict:
    """With everything that has parameters: SwiGLU, RMS norm, q/k norm, layer scale; or MLP, layer norm, causal."""
    attention = {"qk_norm": True} if swiglu else {"causal": True}
    mlp, norm = (SwiGLU, RMSNorm) if swiglu else (MLP, lambda width: LayerNorm(width, 1e-6))
    blocks = nn.ModuleDict({
        str(index): Block(
            WIDTH, Attention(WIDTH, HEADS, mesh=mesh, **attention), mlp(WIDTH, HIDDEN, mesh=mesh), norm,
            0.5 if swiglu else None,
        )
        for index in range(DEPTH)
    })
    generator = torch.Generator().manual_seed(0)
    for parameter in blocks.parameters():
        shape, shard = list(parameter.shape), shard_of(parameter)
        if shard is not None:
            shape[shard.dim] *= mesh.tp
        full = torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.3).to(dtype)
        parameter.data = cut(full, shard, mesh.tp_rank, mesh.tp).contiguous()
    return blocks


def plan(case: dict) -> DropPlan | None:
    sizes = [sequences for sequences, _ in case["segments"]]
    return draw_drop_plan(
        seed=1, step=2, tag="t", depth=DEPTH, rate=case["drop"], global_sizes=sizes,
        local_rows=[torch.arange(size) for size in sizes],
    )


def evaluate(name: str, mesh: Mesh, mode: str, dtype: torch.dtype, autocast: bool = False) -> dict[str, Tensor]:
    """Output, a block's output taken on the way, and all gradients, whole; the second half as a part of its own."""
    case = CASES[name]
    blocks = stack(mesh, case["swiglu"], dtype)
    pairs = [(int(index), block) for index, block in blocks.items()]
    generator = torch.Generator().manual_seed(1)
    total = sum(sequences * length for sequences, length in case["segments"])
    x, weight, early = (torch.randn(total, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    x.requires_grad_()
    tables = [AxialRope(WIDTH // HEADS, "float32").tables(*side, prefix=1) for side in case.get("sides", ())] or None
    taken: dict[int, Tensor | None] = {0: None}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = x * 1
        for part in (pairs[:1], [], pairs[1:]):  # as pipeline ranks have them
            y = run_blocks(part, y, case["segments"], tables, plan(case), mode, taken)
    ((y * weight).sum() + (taken[0] * early).sum()).backward()
    found = {"y": y.detach(), "taken": taken[0].detach(), "x": x.grad}
    return found | whole_gradients(blocks, mesh)


SETTINGS = [
    *((name, mode, torch.float32, False) for name in CASES for mode in MODES),
    *(("vision", mode, torch.float64, False) for mode in MODES), ("vision", "selective", torch.float32, True),
]


def sent(mesh: Mesh, mode: str) -> dict[str, tuple[int, int]]:
    """Calls and payload bytes of the large transfers of one block on 21 tokens: what is per token, not per weight."""
    x = torch.randn(21, WIDTH, requires_grad=True)
    with count_traffic(mesh) as traffic:
        run_blocks([(0, stack(mesh, False, torch.float32)["0"])], x, ((3, 7),), None, None, mode).sum().backward()
    large = [t for t in traffic.select("tp") if t.bytes > 4 * WIDTH]
    return {
        op: (sum(t.op == op for t in large), sum(t.bytes for t in large if t.op == op))
        for op in ("all_reduce", "all_gather", "reduce_scatter")
    }


def held(mesh: Mesh, mode: str) -> float:
    """Bytes per token that a block makes and leaves to its backward, its input included."""
    block, bytes_of = stack(mesh, True, torch.float32)["0"], []
    for sequences in (4, 8):
        leaf, segments = torch.randn(8 * sequences, WIDTH, requires_grad=True), ((sequences, 8),)
        with Operations() as operations:
            y = run_blocks([(0, block)], leaf * 1, segments, None, None, mode)
        bytes_of.append(operations.settled_bytes() - y.untyped_storage().nbytes())
    return (bytes_of[1] - bytes_of[0]) / 32


def on_rank(rank: int) -> dict:
    results: dict = {}
    for tp in (2, 4):
        mesh = build_mesh(tp, 1, sequence_parallel=True)
        results[tp] = {setting: evaluate(setting[0], mesh, *setting[1:]) for setting in SETTINGS}
        results[tp]["sent"] = {mode: sent(mesh, mode) for mode in MODES[:2]}
        results[tp]["sent"]["plain"] = sent(build_mesh(tp, 1), "none")
        results[tp]["held"] = {mode: held(mesh, mode) for mode in MODES}
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(4, on_rank)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s[0]}-{s[1]}-{str(s[2])[6:]}{'-bf16' * s[3]}")
def test_equals_one_process(setting: tuple, tp: int, ranks: list[dict]) -> None:
    name, _, dtype, autocast = setting
    expected = evaluate(name, SINGLE, "none", dtype, autocast)
    bound = 2e-2 if autocast else {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for results in ranks:
        found = results[tp][setting]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            error = (found[key] - value).norm() / value.norm()
            assert error <= bound, f"{key}: {error:.1e}"


@pytest.mark.parametrize("tp", [2, 4])
def test_every_activation_is_cut(tp: int, ranks: list[dict]) -> None:
    expected = {mode: held(SINGLE, mode) / tp for mode in MODES}
    assert all(results[tp]["held"] == expected for results in ranks)


@pytest.mark.parametrize("tp", [2, 4])
def test_what_is_sent(tp: int, ranks: list[dict]) -> None:
    """Two all-reduces forward and two backward become as many pairs of all-gather and reduce-scatter, of the padded
    tokens; besides, an all-gather at either end of the blocks, and two to have the gathered tokens again."""
    padded = -(-21 // tp) * tp * WIDTH * 4
    for results in ranks:
        found = results[tp]["sent"]
        assert found["plain"] == {"all_reduce": (4, 4 * 21 * WIDTH * 4), "all_gather": (0, 0), "reduce_scatter": (0, 0)}
        for mode in MODES[:2]:
            assert found[mode] == {
                "all_reduce": (0, 0), "all_gather": (8, 8 * padded), "reduce_scatter": (4, 4 * padded)
            }
