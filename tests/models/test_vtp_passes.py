"""Properties of the training passes that no stored output shows."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from vtp_oracle import TINY

from megavtp.errors import UserError
from megavtp.models.build import build_vtp
from megavtp.nn.drop_path import draw_drop_plan

SMALL = replace(
    TINY, rope_dtype="float32", vision=replace(TINY.vision, depth=2), decoder=replace(TINY.decoder, depth=1)
)


@pytest.fixture
def model():
    return build_vtp(SMALL, seed=1)


def batch():
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks.view(-1)[[1, 5, 20, 63]] = True
    return {
        "images": draw(3, 3, 64, 64), "tokens": torch.randint(1, 512, (3, 16), generator=generator),
        "global_crops": draw(4, 3, 64, 64), "local_crops": draw(6, 3, 32, 32), "masks": masks,
        "masked_rows": masks.flatten().nonzero().squeeze(1),
    }


def student_inputs(data):
    return {name: data[name] for name in ("global_crops", "local_crops", "masks", "masked_rows")}


def objective(model, data, drop=None):
    """One number that touches every output of all passes."""
    parts = [*model("contrastive", images=data["images"], tokens=data["tokens"])[:3]]
    parts += model("student", **student_inputs(data), drop=drop)
    parts.append(model("reconstruction", images=data["images"]))
    return sum((p * torch.linspace(-1, 1, p.numel()).view(p.shape)).sum() for p in parts)


def grads_of(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(model):
    grads = grads_of(model, objective(model, batch()))
    names = {name for name, _ in model.named_parameters() if not name.startswith("teacher.")}
    assert grads.keys() == names
    assert grads["trunk.mask_token"].abs().sum() > 0


def test_recompute_changes_nothing():
    rows = [torch.arange(4), torch.arange(6)]
    drop = draw_drop_plan(seed=0, step=0, tag="t", depth=2, rate=0.3, global_sizes=[4, 6], local_rows=rows)
    results = []
    for recompute in ("none", "full"):
        model = build_vtp(SMALL, seed=1, recompute=recompute)
        value = objective(model, batch(), drop)
        results.append((value, grads_of(model, value)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())


def test_micro_batches_add_up_under_stochastic_depth(model):
    """Gradients of two halves, each with its part of one global draw, sum to those of the whole."""
    data = batch()
    draw = dict(seed=0, step=3, tag="t", depth=2, rate=0.4, global_sizes=[3])

    def run(rows):
        plan = draw_drop_plan(**draw, local_rows=[rows])
        return model("reconstruction", images=data["images"][rows], drop=plan).square().sum()

    whole = grads_of(model, run(torch.arange(3)))
    parts = [grads_of(model, run(rows)) for rows in (torch.tensor([2]), torch.tensor([0, 1]))]
    for name, grad in whole.items():
        assert torch.allclose(parts[0][name] + parts[1][name], grad, rtol=1e-4, atol=1e-4), name


def test_only_masked_patches_see_the_mask_token(model):
    data = batch()
    with torch.no_grad():
        free = model.trunk([data["global_crops"]])[0]
        none = model.trunk([data["global_crops"]], [torch.zeros(4, 16, dtype=torch.bool)])[0]
        masked = model.trunk([data["global_crops"]], [data["masks"]])[0]
    assert torch.equal(free, none)
    assert torch.equal(masked[2], free[2]) and not torch.allclose(masked[0], free[0])


def test_text_sees_no_future(model):
    """A later token changes no earlier position, also after a trip through the meta device and a state dict."""
    clone = build_vtp(SMALL, seed=2)
    clone.load_state_dict(model.state_dict())
    tokens = torch.arange(1, 17)[None].repeat(2, 1)
    tokens[1, 10:] = 100
    x = clone.text.token_embedding(tokens) + clone.text.positional_embedding
    for block in clone.text.blocks.values():
        x = block(x.view(32, -1), ((2, 16),)).view(2, 16, -1)
    assert torch.equal(x[0, :10], x[1, :10])
    assert not torch.allclose(x[0, 10:], x[1, 10:])


def test_scale_is_capped_but_its_gradient_is_not(model):
    data = batch()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    scale = model("contrastive", images=data["images"], tokens=data["tokens"])[2]
    assert scale.item() == pytest.approx(100.0, rel=1e-5)
    scale.backward()
    assert model.logit_scale.grad.item() == pytest.approx(100.0, rel=1e-5)


def test_shared_bottleneck_feeds_all_objectives():
    vision = replace(SMALL.vision, clip_feature="pooled")
    model = build_vtp(replace(SMALL, bottleneck_reconstruction_only=False, vision=vision))
    data = batch()
    assert model.visual_proj.weight.shape == (64, 16) and model.dino_head.mlp[0].weight.shape == (48, 16)
    assert model("student", **student_inputs(data))[-1].shape == (4, 16)
    cls, patches = model("features", images=data["images"])
    pooled = model.visual_proj(model.trunk.bottleneck(patches).mean(1))
    expected = torch.nn.functional.normalize(pooled, dim=-1)
    assert torch.allclose(model("encode_image", images=data["images"]), expected, atol=1e-6)
    objective(model, data).backward()


def test_bottleneck_of_full_width_is_absent():
    model = build_vtp(replace(SMALL, bottleneck=128))
    assert model.trunk.feature_bottleneck is None
    assert model("encode", images=batch()["images"]).shape == (3, 128, 4, 4)


def test_no_local_crops_and_no_masked_patches(model):
    data = batch()
    none = torch.tensor([], dtype=torch.long)
    for local in (None, data["local_crops"][:0]):
        out = model("student", global_crops=data["global_crops"], masks=data["masks"] & False, masked_rows=none,
                    local_crops=local)
        assert [len(x) for x in out[:3]] == [4, 0, 0]
        sum(x.sum() for x in out).backward()
    assert [len(x) for x in model("teacher", global_crops=data["global_crops"], masked_rows=none)[:2]] == [4, 0]


def test_whole_model_in_bfloat16(model):
    data = batch()
    model.bfloat16()
    image, text, _, _ = model("contrastive", images=data["images"], tokens=data["tokens"])
    assert image.dtype == text.dtype == torch.float32
    assert model("reconstruction", images=data["images"]).dtype == torch.bfloat16
    objective(model, data).backward()


def test_under_bfloat16_residual_streams_stay_float32_and_head_features_do_not():
    model, data, streams = build_vtp(SMALL, seed=1, compute_dtype=torch.bfloat16), batch(), []
    for tower in (model.trunk, model.text, model.pixel_decoder):
        for block in tower.blocks.values():
            block.register_forward_hook(lambda _, inputs, output: streams.extend([inputs[0].dtype, output.dtype]))
    model("contrastive", images=data["images"], tokens=data["tokens"])
    model("reconstruction", images=data["images"])
    assert set(streams) == {torch.float32}
    *features, prototypes, backbone = model("student", **student_inputs(data))
    assert {x.dtype for x in features} == {torch.bfloat16} and prototypes.dtype == backbone.dtype == torch.float32


def test_the_decoder_draws_patches_of_the_encoders_size():
    model = build_vtp(replace(SMALL, patch_size=8), objectives={"reconstruction"})
    assert model("encode", images=torch.zeros(1, 3, 16, 24)).shape[2:] == (2, 3)
    assert model("reconstruction", images=torch.zeros(1, 3, 16, 24)).shape == (1, 3, 16, 24)


def test_bfloat16_compute_with_stochastic_depth_is_close_to_float32():
    data, rows = batch(), [torch.arange(4), torch.arange(6)]
    drop = draw_drop_plan(seed=0, step=0, tag="t", depth=2, rate=0.3, global_sizes=[4, 6], local_rows=rows)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_vtp(SMALL, seed=1, compute_dtype=dtype)
        outputs.append(model("student", **student_inputs(data), drop=drop))
    for a, b in zip(*outputs):
        assert (a.float() - b.float()).abs().max() < 0.1 and a.shape == b.shape


@pytest.mark.parametrize("call, message", [
    (lambda m: m("encode", images=torch.zeros(1, 3, 60, 64)), "60x64"),
    (lambda m: m("encode_text", tokens=torch.zeros(1, 8, dtype=torch.long)), "model.text.context_length"),
    (lambda m: m("features", images=torch.zeros(1, 3, 64, 64), layers=[2]), "block 2"),
])
def test_bad_inputs_are_named(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)
