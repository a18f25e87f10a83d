"""The joint model against the official code's stored outputs."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from vtp_oracle import DATA, TINY, assert_matches_oracle, plain_trunk, stored

from megavtp.checkpoint.formats.hf_vtp import load_folder, load_tensors, official_name
from megavtp.models.build import build_vtp, load_full
from megavtp.models.text_encoder import TextEncoder
from megavtp.nn.drop_path import BranchDrop, DropPlan

PUBLIC = {"contrastive", "reconstruction"}


@pytest.fixture(scope="module")
def model():
    config, tensors = load_folder(DATA / "default")
    model = build_vtp(config, objectives=PUBLIC)
    load_full(model, tensors)
    return model


@pytest.fixture(scope="module")
def inputs():
    return stored("oracle_in")


@pytest.fixture(scope="module")
def outputs():
    return stored("default/oracle_out")


@torch.no_grad()
def test_trunk_equals_the_plain_formula(model, inputs):
    weights = load_tensors(DATA / "default")
    plain = [
        plain_trunk(weights, inputs["crops_global"], 3, 2, inputs["masks_global"]),
        plain_trunk(weights, inputs["crops_local"], 3, 2),
    ]
    crops = [inputs["crops_global"], inputs["crops_local"]]
    for normalise in (False, True):
        packed = model.trunk(crops, [inputs["masks_global"], None], normalise=normalise)
        for tokens, expected in zip(packed, plain):
            assert torch.allclose(tokens, expected[normalise], atol=1e-5)


def test_trunk_gradients_equal_the_plain_formula(model, inputs):
    weights = {name: t.requires_grad_(t.is_floating_point()) for name, t in load_tensors(DATA / "default").items()}
    images, mask = inputs["crops_global"], inputs["masks_global"]
    plain = plain_trunk(weights, images, 3, 2, mask)[1]
    tokens = model.trunk([images], [mask])[0]
    model.zero_grad()
    for x in (plain, tokens):
        (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum().backward()
    for name, parameter in model.trunk.named_parameters(prefix="trunk"):
        if parameter.grad is not None:
            expected = weights[name].grad
            assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm() + 1e-5, name


@torch.no_grad()
def test_features(model, inputs, outputs):
    for case, images in (("last", "image"), ("last_rect", "image_rect")):
        cls, patches = model("features", images=inputs[images])
        assert_matches_oracle(cls, outputs[f"{case}/cls_token"])
        assert_matches_oracle(patches, outputs[f"{case}/patch_tokens"])
    cls, patches = model("features", images=inputs["image"], layers=[-2, -1])[0]
    assert_matches_oracle(patches, outputs["inter2/0/0"])
    assert_matches_oracle(cls, outputs["inter2/0/1"])
    tokens = model.trunk([inputs["image_rect"]], layers=[0, 2], normalise=False)[1][0][:, 1:]
    assert_matches_oracle(tokens.transpose(1, 2).unflatten(2, (3, 5)), outputs["inter_idx/1"])


@torch.no_grad()
def test_latents_and_images(model, inputs, outputs):
    latents = model("encode", images=inputs["image"])
    assert_matches_oracle(latents, outputs["latents"])
    assert_matches_oracle(model("encode", images=inputs["image_rect"]), outputs["latents_rect"])
    assert_matches_oracle(model("decode", latents=outputs["latents"]), outputs["decoded"])
    assert_matches_oracle(model("decode", latents=inputs["latent_rect"]), outputs["decoded_rect"])
    assert torch.equal(model("reconstruction", images=inputs["image"]), model("decode", latents=latents))


@torch.no_grad()
def test_contrastive_side(model, inputs, outputs):
    assert_matches_oracle(model("encode_image", images=inputs["image"]), outputs["clip_img"])
    assert torch.allclose(model("encode_text", tokens=inputs["text"]), outputs["clip_txt"], atol=1e-5)
    assert torch.allclose(model.text(inputs["text"]), outputs["clip_txt_raw"], atol=1e-5)
    image, _, scale, bias = model("contrastive", images=inputs["image"], tokens=inputs["text"][:3])
    assert torch.allclose(scale, torch.tensor(1 / 0.07)) and bias is None
    assert_matches_oracle(scale * image @ outputs["clip_txt"].T / 10, outputs["clip_logits"] / 10)


@torch.no_grad()
def test_bfloat16_autocast(model, inputs, outputs):
    model.compute_dtype = torch.bfloat16
    latents = model("encode", images=inputs["image"])
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - outputs["amp_latents"].float()).abs().max() < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        text = model.text(inputs["text"])
    assert (text.float() - outputs["amp_clip_txt"].float()).abs().max() < 2e-2
    assert model("encode_image", images=inputs["image"]).dtype == torch.float32
    model.compute_dtype = torch.float32


@torch.no_grad()
def test_stochastic_depth_with_the_stored_choice(model, inputs, outputs):
    drawn = [outputs[f"droppath/{i:02d}"] for i in range(12)]
    branches = [BranchDrop((a, b), (2.0, 1.5)) for a, b in zip(drawn[::2], drawn[1::2])]
    plan = DropPlan(tuple(zip(branches[::2], branches[1::2])))
    crops, masks = [inputs["crops_global"], inputs["crops_local"]], [inputs["masks_global"], None]
    for i, tokens in enumerate(model.trunk(crops, masks, plan, normalise=False)):
        assert_matches_oracle(tokens, outputs[f"train_drop/{i}/x_prenorm"])


def test_gradients(model, inputs, outputs):
    expected = stored("default/oracle_grad")
    model.zero_grad()
    _, patches = model("features", images=inputs["image"])
    reconstruction = model("reconstruction", images=inputs["image"])
    image, text, scale, _ = model("contrastive", images=inputs["image"], tokens=inputs["text"][:3])
    logits, labels = scale * image @ text.T, torch.arange(3)
    contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = patches.square().mean() + (reconstruction - inputs["image"]).abs().mean() + contrast
    loss.backward()
    assert abs(loss.item() - outputs["grad_loss"].item()) < 1e-4
    for name, parameter in model.named_parameters():
        grad = parameter.grad.T if name == "text.projection.weight" else parameter.grad
        name = official_name(name, model.config)
        norm = expected[f"norm/{name}"].item()
        assert abs(grad.norm().item() - norm) < 2e-3 * norm + 1e-7, name
        sample = grad.flatten()[:: max(1, grad.numel() // 251)]
        assert (sample - expected[name]).norm() <= 2e-2 * expected[name].norm() + 1e-6, name
    assert torch.equal(model.trunk.mask_token.grad, torch.zeros(1, 128))


def test_text_variant_without_mask_and_projection(inputs):
    """First-token pooling, no causal mask, no projection."""
    tensors = stored("text_variant")
    config = replace(TINY.text, causal=False, pool="first", projection="none")
    text = TextEncoder(config)
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            parameter.copy_(tensors[official_name(f"text.{name}", TINY)])
        assert torch.allclose(text(inputs["text"]), tensors["out/clip_txt_raw"], atol=1e-5)


def legacy_model(stored_tensors):
    """The official training class's state under our names."""
    config = replace(
        TINY, vision=replace(TINY.vision, width=64, depth=2), decoder=replace(TINY.decoder, width=64, depth=1)
    )
    model = build_vtp(config, objectives={"self_distillation"})
    tensors = {}
    for name, tensor in stored_tensors.items():
        if not name.startswith(("in/", "out/", "proj.")):
            tensors[name.replace("teacher_", "teacher.")] = tensor
    load_full(model, tensors)
    return model


@torch.no_grad()
def test_self_distillation_forwards():
    oracle = stored("legacy")
    model = legacy_model(oracle)
    rows = oracle["in/mask_indices_list"]
    cls, masked, prototypes = model("teacher", global_crops=oracle["in/global_crops"], masked_rows=rows)
    first, second = (cls @ prototypes.T).chunk(2)
    # The official class swaps the two crops here; ours leaves that to the loss.
    assert_matches_oracle(torch.cat([second, first]), oracle["out/ssl/teacher/teacher_cls_tokens_after_head"])
    assert_matches_oracle(masked @ prototypes.T, oracle["out/ssl/teacher/masked_teacher_patch_tokens_after_head"])

    global_cls, local_cls, masked, prototypes, pre_head = model(
        "student", global_crops=oracle["in/global_crops"], local_crops=oracle["in/local_crops"],
        masks=oracle["in/masks"], masked_rows=rows,
    )
    student = "out/ssl/student/student"
    assert_matches_oracle(global_cls @ prototypes.T, oracle[f"{student}_global_cls_tokens_after_head"])
    assert_matches_oracle(local_cls @ prototypes.T, oracle[f"{student}_local_cls_tokens_after_head"])
    assert_matches_oracle(masked @ prototypes.T, oracle[f"{student}_global_masked_patch_tokens_after_head"])
    assert_matches_oracle(pre_head, oracle[f"{student}_global_cls_tokens"])


def test_float32_rotation_is_told_from_the_official_one(model, inputs, outputs):
    """The tolerance of these tests is tight enough to notice a rotation in another precision."""
    config = replace(model.config, rope_dtype="float32")
    other = build_vtp(config, objectives=PUBLIC)
    load_full(other, {name: tensor for name, tensor in model.state_dict().items() if "periods" not in name})
    with torch.no_grad():
        latents = other("encode", images=inputs["image"])
    assert (latents - outputs["latents"]).abs().mean() > 20 * 5e-5
    assert math.isfinite(latents.sum())
