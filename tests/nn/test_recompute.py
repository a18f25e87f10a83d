"""What recomputation holds, what it makes again, and that it changes no number."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from operations import Operations
from torch import Tensor, nn

from megavtp.nn import attention_kernels
from megavtp.nn.attention import Attention
from megavtp.nn.block import Block, run_blocks
from megavtp.nn.drop_path import draw_drop_plan
from megavtp.nn.feed_forward import MLP, SwiGLU
from megavtp.nn.norms import LayerNorm, RMSNorm
from megavtp.nn.rope import AxialRope
from megavtp.parallel.mesh import SINGLE

WIDTH, HEADS, HIDDEN, SIDE = 64, 4, 96, 4
LENGTH = SIDE**2 + 1
MODES = ("none", "selective", "full")


def stack(net: str, layer_scale: float | None = None, depth: int = 1) -> nn.ModuleList:
    mlp, norm = (SwiGLU, RMSNorm) if net == "swiglu" else (MLP, lambda width: LayerNorm(width, 1e-6))
    blocks = nn.ModuleList(
        Block(WIDTH, Attention(WIDTH, HEADS, qk_norm=depth > 1), mlp(WIDTH, HIDDEN, mesh=SINGLE), norm, layer_scale)
        for _ in range(depth)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in blocks.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return blocks


def tables() -> list[tuple[Tensor, Tensor]]:
    return [AxialRope(WIDTH // HEADS, "float32").tables(SIDE, SIDE, 1)]


@pytest.fixture(autouse=True)
def attention_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, which is what the bytes are told for."""
    monkeypatch.setattr(attention_kernels, "_suits_float32", lambda q: False)


def held(sequences: int, net: str, mode: str) -> tuple[int, Counter[str]]:
    """Bytes that a block makes and leaves to its backward under bfloat16 autocast, its input included, but not the
    rotary table of all blocks; and the operators of that backward."""
    (block,), rope = stack(net), [tuple(t.bfloat16() for t in tables()[0])]
    leaf = torch.randn(sequences * LENGTH, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with Operations() as forward:
            y = run_blocks([(0, block)], leaf * 1, ((sequences, LENGTH),), rope, None, mode)
        left = forward.live_bytes - y.nbytes - 2 * len(leaf) * rope[0][0][0].nbytes
        with Operations() as backward:
            y.sum().backward()
    return left, backward.calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", ["swiglu", "mlp"])
def test_bytes_held_per_token(net: str, mode: str) -> None:
    """As the docstring of ``nn.block`` says. The difference of two batches leaves out what does not depend on tokens:
    copies of weights, rotary tables."""
    per_token = (held(8, net, mode)[0] - held(4, net, mode)[0]) / (4 * LENGTH)
    hidden = HIDDEN if net == "swiglu" else HIDDEN / 2  # a plain MLP has no gate
    if mode == "none":
        assert 24 * WIDTH + 8 * hidden <= per_token <= 33 * WIDTH + 8 * hidden
    else:
        assert per_token == {"selective": 14 * WIDTH + 4 * hidden, "full": 4 * WIDTH}[mode]


@pytest.mark.parametrize("net", ["swiglu", "mlp"])
def test_selective_makes_no_product_again(net: str) -> None:
    plain, selective, full = (held(4, net, mode)[1] for mode in MODES)
    products = [calls["mm"] + calls["addmm"] for calls in (plain, selective, full)]
    # What is recomputed has gate and value in one product, so that neither is made again.
    assert products[:2] == [10 if net == "swiglu" else 8, 8] and products[2] > products[0]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert plain[attention] == 0 and selective[attention] == full[attention] == 1


@pytest.mark.parametrize("net", ["swiglu", "mlp"])
def test_no_number_changes(net: str) -> None:
    sequences, results = [6, 4], []
    segments = ((6, LENGTH), (4, LENGTH))
    drop = draw_drop_plan(
        seed=0, step=0, tag="t", depth=2, rate=0.3, global_sizes=sequences,
        local_rows=[torch.arange(count) for count in sequences],
    )
    for mode in MODES:
        blocks = stack(net, 0.5, depth=2)
        x = torch.randn(10 * LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = run_blocks(enumerate(blocks), x, segments, tables() * 2, drop, mode)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in blocks.parameters())])
    none, selective, full = results
    assert all(torch.equal(a, b) for a, b in zip(none, full, strict=True))
    # A gated network's input gets its gradient from one product instead of two, which rounds otherwise.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if net == "swiglu" else {"rtol": 0.0, "atol": 0.0}
    for a, b in zip(none, selective, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_nothing_is_recorded_without_gradients() -> None:
    x = torch.randn(LENGTH, WIDTH)
    with torch.no_grad():
        outputs = [run_blocks(enumerate(stack("mlp")), x, ((1, LENGTH),), None, None, mode) for mode in MODES]
    assert all(torch.equal(outputs[0], y) and not y.requires_grad for y in outputs)
