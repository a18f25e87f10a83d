"""What one training step may cost, counted by operators: a bound that is broken shows work that nobody wanted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from distributed import run_ranks
from layouts import Run
from operations import Operations
from tiny_run import PlainRunner, build_model, data_of, passes_of, tiny_config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megavtp.config.share import PassShare, share
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import DiTConfig, DiTModelConfig
from megavtp.dit.flow_matching import FlowMatchingPass
from megavtp.dit.model.build import build_averaged_dit
from megavtp.models.lpips import LPIPS, weight_shapes
from megavtp.nn import attention_kernels
from megavtp.nn.attention import Attention
from megavtp.nn.block import Block, run_blocks
from megavtp.nn.drop_path import _global_choice
from megavtp.nn.feed_forward import SwiGLU
from megavtp.nn.norms import RMSNorm
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import execute
from megavtp.pretraining.passes import build_passes
from megavtp.training.step import train_step

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "attention")
# Operations of forward and backward of a pass of the tiny model; they are launches of kernels, as far as they compute.
BUDGETS = {
    "contrastive": 825, "self_distillation": 1715, "reconstruction": 1145, "second stage": 1790, "discriminator": 925,
    "flow matching": 755,
}


class Products(Operations):
    """Counts the products that read a float32 matrix, too, by name and first shapes."""

    def __init__(self):
        super().__init__()
        self.wide_products: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        # The first four: the gradient, queries, keys and values. Further on, attention has its float32 statistics.
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)][:4]
        if any(part in name for part in PRODUCTS) and any(x.dtype == torch.float32 for x in tensors):
            self.wide_products[name.removeprefix("aten::"), tuple(tuple(x.shape) for x in tensors[:2])] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture(autouse=True)
def attention_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits."""
    monkeypatch.setattr(attention_kernels, "_suits_float32", lambda q: False)


def operations_by_pass(images: int) -> dict[str, Products]:
    """Of forward and backward of a step in bfloat16 with ``images`` for every objective."""
    batches = {name: {"batch": images} for name in ("self_distillation", "reconstruction")}
    batches["self_distillation"]["chunk"] = 1024
    # Latent noise is drawn on the host, image by image, so that it is the same on every layout.
    batches["reconstruction"] |= {"perceptual": "lpips-alex", "l1_weight": 1.0, "latent_noise": 0.0}
    config = tiny_config({
        "objectives": batches, "parallel": {"precision": "bf16"}, "train": {"batch_size": images},
    })
    weights = {name: torch.rand(shape) / 100 for name, shape in weight_shapes("alex").items()}
    lpips = LPIPS("alex", weights, torch.bfloat16)
    _global_choice.cache_clear()  # another test may have drawn the same
    model, batch, found = build_model(config, SINGLE), data_of(config, SINGLE)(0), {}
    for objective in build_passes(config, share(config, 1), SINGLE, torch.device("cpu"), lpips):
        with Products() as found[objective.name]:
            execute(objective, PlainRunner(model, None, 0.0), batch)
    return found


def test_float32_products_are_the_ones_that_need_it_and_work_does_not_grow_with_tokens() -> None:
    found, larger = operations_by_pass(8), operations_by_pass(16)
    b, width, prototypes = 8, 32, 48
    # Logits are differences of nearly equal similarities, times a scale of up to 100: both ways, with two gradients.
    logits = {("mm", ((b, width), (width, b))): 2, ("mm", ((b, b), (b, width))): 4}
    assert found["contrastive"].wide_products == logits
    assert found["reconstruction"].wide_products == {}
    # Which neighbour is nearest; and Sinkhorn-Knopp's sums over 65,536 prototypes and all rows, for class tokens and
    # patches, in two iterations after the first.
    own = found["self_distillation"].wide_products
    assert own.pop(("bmm", ((2, b, width), (2, width, b)))) == 1
    assert sorted(name for name, _ in own.elements()) == ["mm"] * 4 + ["mv"] * 4, own
    assert all(prototypes in shapes[0] or prototypes in shapes[1] for _, shapes in own), own
    for name, operations in found.items():
        assert sum(operations.calls.values()) <= BUDGETS[name], name
        assert operations.calls == larger[name].calls, f"{name}: {larger[name].calls - operations.calls}"
        assert not operations.host_reads, name
    assert found["reconstruction"].calls["convolution"] == 3 + 2 * 5  # LPIPS sees the reference once


def test_the_second_stage() -> None:
    config = tiny_config({
        "model": {"init_from": "not read here"}, "parallel": {"precision": "bf16"},
        "objectives": {
            "contrastive": {"weight": 0.0}, "self_distillation": {"weight": 0.0},
            "reconstruction": {"frozen_encoder": True, "l1_weight": 1.0},
            "adversarial": {"weight": 1.0, "discriminator_start": 0.0, "start": 0.0},
        },
    })
    # In the first step singular vectors are sought from chance, in the later ones from where they were.
    model, batch = build_model(config, SINGLE), data_of(config, SINGLE)(3)
    for objective, name in zip(passes_of(config, SINGLE), ("second stage", "discriminator"), strict=True):
        with Products() as found:
            execute(objective, PlainRunner(model, None, 0.0), batch)
        assert sum(found.calls.values()) <= BUDGETS[name] and not found.host_reads, name
        # The lengths of two gradients are compared, for which each is multiplied out; and the largest singular values
        # of the discriminator's weights are followed, once a step, by products of matrix and vector.
        wide = Counter(product for product, _ in found.wide_products.elements())
        assert wide == ({"mm": 2, "mv": wide["mv"]} if name == "second stage" else {}), found.wide_products


def test_a_dit() -> None:
    settings = DiTModelConfig(width=48, depth=2, heads=2, latent_size=4, latent_channels=2, num_classes=2)
    calls = []
    for images in (8, 16):
        model = build_averaged_dit(settings, compute_dtype=torch.bfloat16)
        flow = FlowMatchingPass(DiTConfig(model=settings), PassShare(images, images, images), torch.device("cpu"))
        latents, noise = torch.randn(2, images, 2, 4, 4)
        times, labels = torch.rand(images), torch.zeros(images, dtype=torch.long)
        batch = LatentBatch(0, [], torch.arange(images), latents, noise, times, labels)
        with Products() as found:
            execute(flow, PlainRunner(model, None, 0.0), batch)
        calls.append(found.calls)
        assert not found.wide_products and not found.host_reads
        assert sum(found.calls.values()) <= BUDGETS["flow matching"]
    assert calls[0] == calls[1]


def operations_of_block(sequences: int, recompute: str) -> Counter[str]:
    """Of forward and backward of one block in bfloat16."""
    block = Block(64, Attention(64, 4), SwiGLU(64, 96, mesh=SINGLE), RMSNorm)
    for parameter in block.parameters():
        parameter.data.normal_(0, 0.1)
    x = torch.randn(sequences * 16, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Operations() as operations:
        run_blocks([(0, block)], x, ((sequences, 16),), None, None, recompute).sum().backward()
    return operations.calls


def test_a_block() -> None:
    calls = operations_of_block(4, "none")
    assert calls == operations_of_block(8, "none")
    assert not calls["cat"]
    # Forward: q, k, v; projection; gate; value; down. Backward: two for each.
    assert calls["addmm"] + calls["mm"] == 5 + 10
    # 10 weights and biases, their 10 gradients, the inputs of three products, and norms' and residuals' float32.
    assert calls["_to_copy"] <= 26
    assert sum(calls.values()) <= 185


def test_sequences_of_two_lengths_are_taken_apart_and_joined_once() -> None:
    q, k, v = (torch.randn(2 * 5 + 3 * 4, 2, 8, requires_grad=True) for _ in range(3))
    with Operations() as operations:
        attention_kernels.attend(q, k, v, ((2, 5), (3, 4))).sum().backward()
    assert operations.calls["cat"] == 4  # the result, and the gradients of queries, keys and values
    assert not operations.calls["slice_backward"]


def on_rank(rank: int, zero: int) -> dict[str, int]:
    """What the host reads in a second step through the engine."""
    run = Run(config=tiny_config({"train": {"steps": 3}, "parallel": {"zero_stage": zero}}, 1)).train(end=1)
    batch = run.data(1)
    with Operations() as operations:
        train_step(run.engine, run.passes, batch, lr_of=lambda group: 1e-3, averaged=run.model.averaged(), follow=0.1)
    run.engine.close()
    return operations.host_reads


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_one_host_read_a_step(zero: int) -> None:
    assert run_ranks(1, on_rank, zero) == [{"_local_scalar_dense": 1}]
