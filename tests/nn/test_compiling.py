"""Compiled regions: one graph each, none anew when sizes change, and the numbers of the plain form."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from test_recompute import HEADS, WIDTH, stack
from tiny_run import PlainRunner, build_model, data_of, passes_of, tiny_config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from megavtp.config.schema import DinoHeadConfig
from megavtp.errors import UserError
from megavtp.models.dino_head import DinoHead
from megavtp.models.lpips import LPIPS, weight_shapes
from megavtp.nn import compiling
from megavtp.nn.block import run_blocks
from megavtp.nn.compiling import compile_networks, compile_regions, compiles, wanted
from megavtp.nn.drop_path import draw_drop_plan
from megavtp.nn.rope import AxialRope
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import execute

ROPE = AxialRope(WIDTH // HEADS, "float32")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def forget() -> None:
    compiling.compiled.cache_clear()
    compiling._prepare.cache_clear()  # the reset forgets the callbacks, too
    torch._dynamo.reset()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is compiled yet, and what is will be forgotten."""
    forget()
    counters.clear()
    yield
    forget()


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Graphs that torch runs as they are, without a compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def train(blocks: nn.ModuleList, sequences: list[int], step: int, mode: str, rate: float = 0.4) -> list[Tensor]:
    """Output and gradients of a pass on packed crops of two sizes, or of one."""
    segments = tuple(zip(sequences, (10, 5)))
    drop = draw_drop_plan(
        seed=0, step=step, tag="t", depth=len(blocks), rate=rate, global_sizes=[2 * n for n in sequences],
        local_rows=[torch.arange(n) for n in sequences],  # of twice as many: what is kept here differs
    )
    generator = torch.Generator().manual_seed(step)
    tables = [ROPE.tables(3, 3, 1), ROPE.tables(2, 2, 1)][: len(sequences)]
    x = torch.randn(sum(n * length for n, length in segments), WIDTH, generator=generator).requires_grad_()
    blocks.zero_grad()
    y = run_blocks(enumerate(blocks), x, segments, tables, drop, mode)
    y.square().sum().backward()
    with torch.no_grad():
        silent = run_blocks(enumerate(blocks), x, segments, tables, None, mode)
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


def test_whole_steps_compile_nothing_anew(light: None) -> None:
    """All objectives, with dropped paths; how many patches are masked differs from step to step."""
    config = tiny_config({
        "parallel": {"compile": "blocks"}, "train": {"steps": 6},
        "objectives": {"self_distillation": {"drop_path": 0.3, "mask_ratio": [0.2, 0.9]}},
    })
    model, data, passes = build_model(config, SINGLE), data_of(config, SINGLE), passes_of(config, SINGLE)
    runner, graphs, masked = PlainRunner(model, None, 0.0), [], set()
    for step in range(6):
        batch = data(step)
        masked.add(int(batch.masks.sum()))
        for objective in passes:
            execute(objective, runner, batch)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(masked) > 2
    assert not counters["graph_break"] and graphs[0] > 4 and len(set(graphs[2:])) == 1, graphs


def test_distances_of_the_perceptual_network_are_compiled(light: None) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in weight_shapes("alex").items()}
    shapes = 4  # of the five features: the last two are alike
    for number, dtype in enumerate((torch.float32, torch.bfloat16), 1):
        plain, network = LPIPS("alex", weights, dtype), LPIPS("alex", weights, dtype)
        compile_regions(network)
        graphs = []
        for count in (2, 3, 5, 4):
            y, *given = (torch.rand(count, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
            x = given[0].requires_grad_()
            expected = torch.autograd.grad(plain(x, y).sum(), x)[0]
            torch.testing.assert_close(torch.autograd.grad(network(x, y).sum(), x)[0], expected, rtol=1e-5, atol=1e-8)
            with torch.no_grad():
                torch.testing.assert_close(network(x, y), plain(x, y))
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [number * shapes * 2] * 4  # with a gradient and without


def test_norms_of_the_dino_head_are_compiled(light: None) -> None:
    torch.manual_seed(0)
    plain = DinoHead(8, DinoHeadConfig(prototypes=6, hidden=4, bottleneck=3))
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    head = deepcopy(plain)
    assert compile_regions(head) == 2

    def results(of: DinoHead, x: Tensor) -> list[Tensor]:
        features, prototypes = of(x)
        gradients = torch.autograd.grad((features @ prototypes.T).exp().sum(), list(of.parameters()))
        return [features, prototypes, *gradients]

    for rows in (5, 1, 0, 7):
        x = torch.randn(rows, 8)
        for a, b in zip(results(head, x), results(plain, x), strict=True):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 3  # features of one row have a graph of their own


@pytest.mark.timeout(900)
def test_the_compiler_gives_the_same_numbers(fresh: None) -> None:
    plain, blocks = stack("swiglu", 0.5, depth=1), stack("swiglu", 0.5, depth=1)
    compile_regions(blocks)
    before = compiling.COMPILED.graphs
    found, expected = (train(of, [4, 6], 0, "none") for of in (blocks, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert compiling.COMPILED.graphs > before and compiling.COMPILED.seconds > 0


def test_a_failure_ends_in_one_line(light: None) -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(UserError, match="torch.compile failed on breaks .*: set parallel.compile=none"):
        compiling.compiled(breaks)(torch.ones(2, 2))


def test_auto_is_for_gpus() -> None:
    assert not compiles("auto", CPU) and not compiles("none", CUDA) and compiles("blocks", CPU)
    assert [wanted("auto", on_gpu=gpu) for gpu in (False, True)] == [False, True]


def test_a_network_that_is_left_as_it_is_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Such as a ViT of another library; what is no module, or absent, is nothing to compile."""
    compile_networks("blocks", CPU, nn.Linear(2, 2), object(), None)
    assert [record.getMessage() for record in caplog.records] == [
        "parallel.compile leaves Linear as it is: it has no regions"
    ]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="there is no C.. compiler: install g.., .*; or set parallel.compile=none"):
        compiles("blocks", CPU)
    assert not compiles("auto", CUDA) and "parallel.compile=auto compiles nothing, as there is no C++" in caplog.text
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="parallel.compile=blocks, but triton is not installed: pip install triton"):
        compiles("blocks", CUDA)
