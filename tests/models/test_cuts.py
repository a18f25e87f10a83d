"""Pipeline ranks together hold the whole model, each name once, with the same values; chunks in turn compute it."""

from dataclasses import replace

import pytest
import torch
from vtp_oracle import TINY

from megavtp.models.build import build_vtp
from megavtp.models.cuts import tower_cuts
from megavtp.models.vtp import OBJECTIVES, VTP
from megavtp.parallel.mesh import Mesh

MODEL = replace(
    TINY, rope_dtype="float32", vision=replace(TINY.vision, depth=5), text=replace(TINY.text, depth=2),
    decoder=replace(TINY.decoder, depth=3),
)
LAYOUTS = [(2, 1), (2, 2), (4, 1), (5, 1)]  # ranks, stages on each


def ranks_of(pp: int, virtual_stages: int, **options) -> list[VTP]:
    meshes = [Mesh(pp=pp, pp_rank=rank, virtual_stages=virtual_stages) for rank in range(pp)]
    return [build_vtp(MODEL, mesh, seed=1, **options) for mesh in meshes]


@pytest.mark.parametrize(("pp", "virtual_stages"), LAYOUTS)
@pytest.mark.parametrize("objectives", [OBJECTIVES, {"contrastive"}, {"self_distillation"}, {"reconstruction"}])
def test_ranks_hold_the_model_once(pp, virtual_stages, objectives):
    whole = dict(build_vtp(MODEL, seed=1, objectives=objectives).named_parameters())
    ranks = [dict(model.named_parameters()) for model in ranks_of(pp, virtual_stages, objectives=objectives)]
    assert sum(map(len, ranks)) == len(whole)
    for own in ranks:
        assert any(name.startswith("trunk.blocks.") for name in own)
        for name, value in own.items():
            assert torch.equal(value, whole[name]) and value.requires_grad == whole[name].requires_grad, name
    if "self_distillation" in objectives:
        pairs = [pair for model in ranks_of(pp, virtual_stages) for pair in model.averaged()]
        assert all(torch.equal(teacher, student) for teacher, student in pairs)
        assert len(pairs) == sum(name.startswith("teacher.") for name in whole)


def inputs_of(mode):
    def draw(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks.view(-1)[[1, 5, 20, 63]] = True
    rows = masks.flatten().nonzero().squeeze(1)
    tokens = torch.randint(1, 512, (3, 16), generator=torch.Generator().manual_seed(1))
    return {
        "contrastive": {"images": draw(3, 3, 64, 64), "tokens": tokens},
        "teacher": {"global_crops": draw(4, 3, 64, 64), "masked_rows": rows},
        "student": {
            "global_crops": draw(4, 3, 64, 64), "local_crops": draw(6, 3, 32, 32), "masks": masks, "masked_rows": rows,
        },
        "reconstruction": {"images": draw(2, 3, 64, 96)}, "encode": {"images": draw(2, 3, 64, 64)},
        "decode": {"latents": draw(2, MODEL.bottleneck, 4, 6)}, "encode_image": {"images": draw(2, 3, 64, 64)},
        "encode_text": {"tokens": tokens}, "features": {"images": draw(2, 3, 64, 64)},
    }[mode]


@pytest.mark.parametrize("mode", [
    "contrastive", "teacher", "student", "reconstruction", "encode", "decode", "encode_image", "encode_text",
    "features",
])
@pytest.mark.parametrize(("pp", "virtual_stages"), LAYOUTS[:2])
def test_stages_compute_the_whole(mode, pp, virtual_stages):
    """Later stages get meta tensors for pixels and latents, and activations are as ``activation_specs`` says."""
    inputs = inputs_of(mode)
    hidden = {k: v.to("meta") if v.is_floating_point() else v for k, v in inputs.items()}
    ranks, activations = ranks_of(pp, virtual_stages), ()
    stages = ranks[0].legs(mode) * pp * virtual_stages
    with torch.no_grad():
        expected = build_vtp(MODEL, seed=1)(mode, **inputs)
        for stage in range(stages):
            model = ranks[stage % pp]
            if stage:
                assert [(tuple(x.shape), x.dtype) for x in activations] == model.activation_specs(mode, stage, **hidden)
            activations = model(mode, stage=stage, activations=activations, **(hidden if stage else inputs))
    torch.testing.assert_close(activations, expected, rtol=0, atol=0)


def test_cuts_are_balanced_by_what_stands_at_the_ends():
    cuts = tower_cuts(MODEL, OBJECTIVES, 2)
    assert {tower: [len(chunk) for chunk in chunks] for tower, chunks in cuts.items()} == {
        "trunk": [2, 3], "text": [1, 1], "pixel_decoder": [2, 1],  # pixels weigh at one end
    }
    heavy = replace(MODEL, dino_head=replace(MODEL.dino_head, prototypes=2**20))
    assert len(tower_cuts(heavy, OBJECTIVES, 2)["trunk"][1]) == 1
    assert len(tower_cuts(heavy, {"contrastive"}, 2)["trunk"][1]) == 3
    assert [len(chunk) for chunk in tower_cuts(MODEL, OBJECTIVES, 5)["text"]].count(0) == 3
