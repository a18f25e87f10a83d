"""The joint model against the official code's stored outputs."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from vtp_oracle import (
    DATA,
    TINY,
    assert_equals,
    assert_matches_oracle,
    plain_decoder,
    plain_dino_head,
    plain_latents,
    plain_trunk,
    stored,
)

from megavtp.checkpoint.formats.hf_vtp import load_folder, load_tensors, official_name
from megavtp.models.build import build_vtp, load_full
from megavtp.nn import attention_kernels
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


@pytest.fixture(scope="module")
def weights():
    return load_tensors(DATA / "default")


@torch.no_grad()
def test_trunk_equals_the_plain_formula(model, inputs, weights):
    plain = [
        plain_trunk(weights, inputs["crops_global"], 3, 2, inputs["masks_global"]),
        plain_trunk(weights, inputs["crops_local"], 3, 2),
    ]
    crops = [inputs["crops_global"], inputs["crops_local"]]
    for normalise in (False, True):
        packed = model.trunk(crops, [inputs["masks_global"], None], normalise=normalise)
        for tokens, expected in zip(packed, plain):
            assert_equals(tokens, expected[normalise])


@torch.no_grad()
@pytest.mark.parametrize("images, latents", [("image", "latents"), ("image_rect", "latent_rect")])
def test_latents_and_images_equal_the_plain_formula(images, latents, model, inputs, outputs, weights):
    images, latents = inputs[images], {**inputs, **outputs}[latents]
    expected = plain_latents(weights, images, 3, 2)
    assert_equals(model("encode", images=images), expected)
    assert_equals(model("decode", latents=latents), plain_decoder(weights, latents, 2, 2))
    assert_equals(model("reconstruction", images=images), plain_decoder(weights, expected, 2, 2))


@pytest.fixture(scope="module")
def finely_rotated():
    """The model with its rotation in float32."""
    config, tensors = load_folder(DATA / "default")
    model = build_vtp(replace(config, rope_dtype="float32"), objectives=PUBLIC)
    own = model.state_dict()
    load_full(model, {name: own[name] if name.endswith("periods") else t for name, t in tensors.items()})
    return model


@torch.no_grad()
def test_how_far_the_last_bit_of_a_pixel_goes(model, finely_rotated, inputs):
    """Rotated in bfloat16, outputs move by what ``assert_matches_oracle`` leaves to other CPUs; in float32 not."""
    image = inputs["image"]
    others = [image * (1 + 2**-24 * torch.randn(image.shape, generator=torch.manual_seed(seed))) for seed in range(4)]

    def moved(model):
        found = [model("encode_image", images=x) for x in (image, *others)]
        return max(float((x - found[0]).abs().mean() / found[0].abs().max()) for x in found[1:])

    assert moved(finely_rotated) < 1e-6 < 5e-6 < moved(model) < 1e-4


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 5e-4), ("float32", 1e-5)])
def test_trunk_gradients_equal_the_plain_formula(dtype, bound, model, finely_rotated, inputs):
    model = {"bfloat16": model, "float32": finely_rotated}[dtype]
    weights = load_tensors(DATA / "default")
    weights |= {name: t for name, t in model.state_dict().items() if name.endswith("periods")}
    weights = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in weights.items()}
    images, mask = inputs["crops_global"], inputs["masks_global"]
    plain = plain_trunk(weights, images, 3, 2, mask)[1]
    tokens = model.trunk([images], [mask])[0]
    model.zero_grad()
    for x in (plain, tokens):
        (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum().backward()
    for name, parameter in model.trunk.named_parameters(prefix="trunk"):
        if parameter.grad is not None:
            expected = weights[name].grad
            assert (parameter.grad - expected).norm() <= bound * expected.norm() + 1e-5, name


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
    assert_equals(model("encode_image", images=inputs["image"]), outputs["clip_img"])
    assert_equals(model("encode_text", tokens=inputs["text"]), outputs["clip_txt"])
    assert_equals(model.text(inputs["text"]), outputs["clip_txt_raw"])
    image, _, scale, bias = model("contrastive", images=inputs["image"], tokens=inputs["text"][:3])
    assert torch.allclose(scale, torch.tensor(1 / 0.07)) and bias is None
    assert_equals(image @ outputs["clip_txt"].T, outputs["clip_logits"] / scale)


@torch.no_grad()
def test_bfloat16_autocast(model, inputs, outputs, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_suits_float32", lambda q: False)  # stored: 16-bit attention
    monkeypatch.setattr(model, "compute_dtype", torch.bfloat16)
    latents = model("encode", images=inputs["image"])
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - outputs["amp_latents"].float()).abs().max() < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        text = model.text(inputs["text"])
    assert (text.float() - outputs["amp_clip_txt"].float()).abs().max() < 2e-2
    assert model("encode_image", images=inputs["image"]).dtype == torch.float32


@torch.no_grad()
def test_stochastic_depth_with_the_stored_choice(model, inputs, outputs, weights):
    drawn = [outputs[f"droppath/{i:02d}"] for i in range(12)]
    branches = [BranchDrop((a, b), (2.0, 1.5)) for a, b in zip(drawn[::2], drawn[1::2])]
    plan = DropPlan(tuple(zip(branches[::2], branches[1::2])))
    crops, masks = [inputs["crops_global"], inputs["crops_local"]], [inputs["masks_global"], None]
    for i, tokens in enumerate(model.trunk(crops, masks, plan, normalise=False)):
        dropped = [(rows, branches[0].scales[i]) for rows in drawn[i::2]]
        assert_equals(tokens, plain_trunk(weights, crops[i], 3, 2, masks[i], dropped)[0])
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


@torch.no_grad()
def test_a_model_for_contrast_alone(inputs):
    """No decoder; another feed-forward width and scale; text without causal mask and projection, read at its start."""
    config, tensors = load_folder(DATA / "clip_only")
    text = config.text
    assert (config.vision.ffn, text.causal, text.pool, text.projection) == ("swiglu128", False, "first", "none")
    model = build_vtp(config, objectives={"contrastive"})
    load_full(model, tensors)
    expected, image = stored("clip_only/oracle_out"), inputs["image"]
    assert_equals(model("encode_text", tokens=inputs["text"]), expected["clip_txt"])
    assert_equals(model.text(inputs["text"]), expected["clip_txt_raw"])
    assert_matches_oracle(model("encode_image", images=image), expected["clip_img"])
    features, _, scale, _ = model("contrastive", images=image, tokens=inputs["text"][:3])
    assert scale == torch.tensor(3.0).exp()
    assert_matches_oracle(features @ expected["clip_txt"].T, expected["clip_logits"] / scale)
    plain = load_tensors(DATA / "clip_only")
    tokens = torch.cat([model("features", images=image)[0][:, None], model("features", images=image)[1]], 1)
    assert_equals(tokens, plain_trunk(plain, image, 3, 1)[1])
    assert_equals(model("encode", images=image), plain_latents(plain, image, 3, 1))
    assert_matches_oracle(tokens[:, 0], expected["last/cls_token"])
    assert_matches_oracle(tokens[:, 1:], expected["last/patch_tokens"])
    assert_matches_oracle(model("encode", images=image), expected["latents"])


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
    crops, rows = oracle["in/global_crops"], oracle["in/mask_indices_list"]
    weights = {name.removeprefix("teacher_"): t for name, t in oracle.items() if name.startswith("teacher_")}
    tokens = plain_trunk(weights, crops, 2, 2)[1]
    cls, masked, prototypes = model("teacher", global_crops=crops, masked_rows=rows)
    assert_equals(cls @ prototypes.T, plain_dino_head(weights, tokens[:, 0]))
    assert_equals(masked @ prototypes.T, plain_dino_head(weights, tokens[:, 1:].flatten(0, 1)[rows]))
    first, second = (cls @ prototypes.T).chunk(2)
    # The official class swaps the two crops here; ours leaves that to the loss.
    assert_matches_oracle(torch.cat([second, first]), oracle["out/ssl/teacher/teacher_cls_tokens_after_head"])
    assert_matches_oracle(masked @ prototypes.T, oracle["out/ssl/teacher/masked_teacher_patch_tokens_after_head"])

    global_cls, local_cls, masked, prototypes, pre_head = model(
        "student", global_crops=crops, local_crops=oracle["in/local_crops"], masks=oracle["in/masks"], masked_rows=rows,
    )
    tokens, local = (
        plain_trunk(oracle, images, 2, 2, mask)[1]
        for images, mask in ((crops, oracle["in/masks"]), (oracle["in/local_crops"], None))
    )
    student = "out/ssl/student/student"
    for found, plain, name in (
        (global_cls, tokens[:, 0], "global_cls_tokens"), (local_cls, local[:, 0], "local_cls_tokens"),
        (masked, tokens[:, 1:].flatten(0, 1)[rows], "global_masked_patch_tokens"),
    ):
        assert_equals(found @ prototypes.T, plain_dino_head(oracle, plain))
        assert_matches_oracle(found @ prototypes.T, oracle[f"{student}_{name}_after_head"])
    assert_equals(pre_head, tokens[:, 0])
    assert_matches_oracle(pre_head, oracle[f"{student}_global_cls_tokens"])


def test_float32_rotation_is_told_from_the_official_one(model, inputs, outputs):
    """The tolerance of these tests is tight enough to notice a rotation in another precision."""
    config = replace(model.config, rope_dtype="float32")
    other = build_vtp(config, objectives=PUBLIC)
    load_full(other, {name: tensor for name, tensor in model.state_dict().items() if "periods" not in name})
    with torch.no_grad():
        latents = other("encode", images=inputs["image"])
    difference = (latents - outputs["latents"]).abs().mean() / outputs["latents"].abs().max()
    assert difference > 20 * 1e-5
    assert math.isfinite(latents.sum())
