"""Two tensor-parallel processes give one process's outputs and gradients."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from vtp_oracle import TINY

from megavtp.models.build import build_vtp
from megavtp.parallel.collectives import copy_to_tp
from megavtp.parallel.mesh import SINGLE, build_mesh
from megavtp.parallel.sharding import merge, shard_of

CONFIG = replace(
    TINY, rope_dtype="float32", vision=replace(TINY.vision, depth=2, qk_norm=True, layer_scale=0.5),
    decoder=replace(TINY.decoder, depth=1, ffn="mlp"), text=replace(TINY.text, depth=1, projection_bias=True),
)


def outputs_and_grads(mesh):
    model = build_vtp(CONFIG, mesh, seed=3)
    generator = torch.Generator().manual_seed(0)
    images, crops = (torch.randn(n, 3, s, s, generator=generator) for n, s in ((2, 64), (4, 32)))
    tokens = torch.randint(1, 512, (2, 16), generator=generator)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 3:6] = True
    rows = masks.flatten().nonzero().squeeze(1)
    outputs = list(model("contrastive", images=images, tokens=tokens)[:3])
    outputs.append(model("reconstruction", images=images))
    *features, prototypes, pre_head = model(
        "student", global_crops=images, local_crops=crops, masks=masks, masked_rows=rows
    )
    outputs += [*features, pre_head]
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs)
    # A loss on prototypes: every rank has its own rows of them, and features meet all rows.
    logits = copy_to_tp(features[0], mesh) @ prototypes.T
    loss = loss + logits.square().sum()
    loss.backward()
    with torch.no_grad():
        teacher = model("teacher", global_crops=images, masked_rows=rows)[:2]
    grads = {name: (p.grad, shard_of(p)) for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in (*outputs, *teacher)], grads


def on_two_ranks(rank):
    return [outputs_and_grads(build_mesh(2, 1, sequence_parallel=shared)) for shared in (False, True)]


@pytest.fixture(scope="module")
def both_ranks():
    return run_ranks(2, on_two_ranks)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_equal_one(sequence_parallel, both_ranks):
    outputs, grads = outputs_and_grads(SINGLE)
    ranks = [results[sequence_parallel] for results in both_ranks]
    for rank_outputs, _ in ranks:
        for x, expected in zip(rank_outputs, outputs, strict=True):
            assert torch.allclose(x, expected, atol=1e-5)
    for name, (grad, shard) in grads.items():
        pieces = [rank_grads[name][0] for _, rank_grads in ranks]
        if shard is None:
            assert torch.allclose(pieces[0], pieces[1], atol=1e-4, rtol=1e-4), name
        scale = grad.abs().max()
        assert (merge(pieces, shard) - grad).abs().max() <= 1e-4 * scale + 1e-6, name
