import json
import math
from dataclasses import replace

import pytest
import torch
from vtp_oracle import DATA, TINY

from megavtp.checkpoint.formats.hf_vtp import official_name
from megavtp.errors import UserError
from megavtp.models.build import build_vtp, load_full
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.sharding import merge, shard_of

# Where the official training class keeps CLIP's scheme, and the inference class, whose statistics are stored, resets
# all linears to 0.02. T = 64, two blocks.
OWN_STD = {
    "attn.out_proj.weight": 64**-0.5 / 2, "mlp.c_fc.weight": 128**-0.5, "mlp.c_proj.weight": 64**-0.5 / 2,
    "visual_proj.weight": 1 / math.sqrt(3 * 128),
}


@pytest.fixture(scope="module")
def model():
    return build_vtp(TINY, seed=5)


def test_distributions(model):
    expected = json.loads((DATA / "init_stats.json").read_text())
    checked = 0
    for name, parameter in model.named_parameters():
        official = official_name(name, TINY)
        if official not in expected:
            assert name.startswith(("teacher.", "dino_head.")), name
            continue
        mean, std, low, high = expected[official]
        own = [value for suffix, value in OWN_STD.items() if official.endswith(suffix)]
        std = own[0] if own else std
        count = parameter.numel()
        if count == 1 or std == 0:
            assert torch.allclose(parameter, torch.full_like(parameter, mean)), name
            continue
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(count), name
        assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(count), name
        if "patch_embed" in name:
            assert parameter.abs().max() <= 1 / math.sqrt(3 * 256)
        checked += 1
    assert checked > 40


def test_dino_head(model):
    head = model.dino_head
    assert abs(head.mlp[0].weight.std() - 0.02) < 1e-3
    assert torch.equal(head.last_layer.weight_g, torch.ones(96, 1))
    assert head.last_layer.weight_v.abs().max() <= 24**-0.5
    assert head.last_layer.weight_v.std() > 0.9 * 24**-0.5 / math.sqrt(3)


def test_teacher_starts_as_the_student(model):
    pairs = model.averaged()
    assert len(pairs) == len(list(model.trunk.parameters())) + len(list(model.dino_head.parameters()))
    for teacher, student in pairs:
        assert torch.equal(teacher, student) and teacher is not student
        assert student.requires_grad and not teacher.requires_grad


def test_seed_decides(model):
    again, other = build_vtp(TINY, seed=5), build_vtp(TINY, seed=6)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert a.std(correction=0) == 0 or not torch.equal(a, c), name


def test_values_do_not_depend_on_objectives(model):
    alone = dict(build_vtp(TINY, seed=5, objectives={"reconstruction"}).named_parameters())
    whole = dict(model.named_parameters())
    assert alone.keys() < whole.keys()
    assert all(torch.equal(parameter, whole[name]) for name, parameter in alone.items())


def test_values_do_not_depend_on_tensor_parallel_size(model):
    parts = [dict(build_vtp(TINY, Mesh(tp=2, tp_rank=rank), seed=5).named_parameters()) for rank in range(2)]
    for name, whole in model.named_parameters():
        pieces = [part[name] for part in parts]
        assert shard_of(pieces[0]) == shard_of(whole)
        assert torch.equal(merge(pieces, shard_of(whole)), whole), name


def test_layer_scale_and_logits_start_at_their_config_values():
    config = replace(
        TINY, vision=replace(TINY.vision, layer_scale=0.1, qk_norm=True), text=replace(TINY.text, layer_scale=0.2),
        decoder=replace(TINY.decoder, layer_scale=0.3), init_logit_scale=2.0, init_logit_bias=-10.0,
    )
    values = dict(build_vtp(config).named_parameters())
    for name, value in {
        "trunk.blocks.0.ls1.gamma": 0.1, "text.blocks.1.ls2.gamma": 0.2, "pixel_decoder.blocks.0.ls1.gamma": 0.3,
        "logit_scale": 2.0, "logit_bias": -10.0, "trunk.blocks.0.attn.q_norm.weight": 1.0,
    }.items():
        assert torch.allclose(values[name], torch.full_like(values[name], value)), name


def test_loading_lists_every_fault(model):
    tensors = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("teacher.")}
    tensors["extra"] = tensors.pop("trunk.cls_token")
    tensors["trunk.norm.weight"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        load_full(build_vtp(TINY), tensors)
    for part in ("unexpected extra", "missing trunk.cls_token", "trunk.norm.weight has shape [3], not [128]"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
