"""Compiled regions: one graph each, none anew when sizes change, and the numbers of the plain form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_recompute import HEADS, WIDTH, stack
from torch import Tensor, nn
from torch._dynamo.utils import counters

from megavtp.nn import compiling
from megavtp.nn.block import run_blocks
from megavtp.nn.compiling import compile_regions
from megavtp.nn.drop_path import draw_drop_plan
from megavtp.nn.rope import AxialRope

ROPE = AxialRope(WIDTH // HEADS, "float32")
TABLES = [ROPE.tables(3, 3, 1), ROPE.tables(2, 2, 1)]


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs that torch runs as they are, without a compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    compiling.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    compiling.compiled.cache_clear()
    torch._dynamo.reset()


def train(blocks: nn.ModuleList, sequences: list[int], step: int, mode: str, rate: float = 0.4) -> list[Tensor]:
    """Output and gradients of a pass on packed crops of two sizes, or of one."""
    segments = tuple(zip(sequences, (10, 5)))
    drop = draw_drop_plan(
        seed=0, step=step, tag="t", depth=len(blocks), rate=rate, global_sizes=[2 * n for n in sequences],
        local_rows=[torch.arange(n) for n in sequences],  # of twice as many: what is kept here differs
    )
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(n * length for n, length in segments), WIDTH, generator=generator).requires_grad_()
    blocks.zero_grad()
    y = run_blocks(enumerate(blocks), x, segments, TABLES[: len(sequences)], drop, mode)
    y.square().sum().backward()
    with torch.no_grad():
        silent = run_blocks(enumerate(blocks), x, segments, TABLES[: len(sequences)], None, mode)
    return [y.detach(), silent, x.grad, *(p.grad.clone() for p in blocks.parameters())]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("net", ["swiglu", "mlp"])
def test_nothing_is_compiled_anew(net: str, mode: str, light: None) -> None:
    plain, blocks = stack(net, 0.5, depth=2), stack(net, 0.5, depth=2)
    compile_regions(blocks)
    graphs = []
    for step, sequences in enumerate([[4, 6], [5, 3], [7], [2, 2], [9, 1], [1], [3]]):
        found, expected = (train(of, sequences, step, mode) for of in (blocks, plain))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"] and graphs[0] > 4 and len(set(graphs[2:])) == 1, graphs
