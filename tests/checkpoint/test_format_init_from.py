"""Initial weights from timm and OpenCLIP, against these libraries' own outputs (tests/data/init_from/make.py)."""

import importlib.util
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vtp_oracle import DATA as VTP_DATA
from vtp_oracle import TINY

from megavtp.checkpoint.formats.convert import convert_tokenizer
from megavtp.checkpoint.formats.initial import fill, read_initial
from megavtp.config.schema import DecoderConfig, ModelConfig, TextConfig, VisionConfig
from megavtp.errors import UserError
from megavtp.models.build import build_vtp
from megavtp.models.vtp import OBJECTIVES
from megavtp.nn.block import run_blocks
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.sharding import cut, shard_of

DATA = Path(__file__).parents[1] / "data" / "init_from"
CONFIG = ModelConfig(
    image_size=32, patch_size=8, bottleneck=8, rope_dtype="float32",
    vision=VisionConfig(width=32, depth=2, heads=2, ffn="mlp", norm="layernormbf16", layer_scale=1e-5),
    text=TextConfig(width=32, depth=2, heads=2, context_length=8, vocab_size=64),
    decoder=DecoderConfig(width=32, depth=1, heads=2),
    dino_head=replace(TINY.dino_head, prototypes=16, hidden=16, bottleneck=8),
)
GATED = {"dinov3_plus": 6.0, "dinov2_giant": 3.0}  # mlp_ratio that gives the file's hidden width


def config_for(name):
    vision = CONFIG.vision
    if name in GATED:
        vision = replace(vision, ffn="swiglu", mlp_ratio=GATED[name])
    if name == "dinov2_giant":
        vision = replace(vision, norm="layernorm")
    if name == "openclip":
        vision = replace(vision, layer_scale=None)
    return replace(CONFIG, vision=vision)


def started(name, objectives=OBJECTIVES):
    config = config_for(name)
    tensors, notes = read_initial(str(DATA / f"{name}.safetensors"), config, objectives)
    model = build_vtp(config, objectives=objectives, seed=1)
    fill(model, tensors)
    return model, tensors, notes


def test_what_is_frozen_must_be_given_whole():
    config, path = config_for("dinov3"), str(DATA / "dinov3.safetensors")
    read_initial(path, config, {"reconstruction"})
    with pytest.raises(UserError, match=r"does not give trunk\.feature_bottleneck\.weight.*would keep random values"):
        read_initial(path, config, {"reconstruction"}, frozen_encoder=True)


def without_rotation(model):
    """Libraries whose blocks do not rotate: an angle of 2 pi c / infinity is 0."""
    model.trunk.rope_embed.periods.fill_(torch.inf)
    return model


def stack(model, tokens):
    """Blocks and final norm of the trunk on given tokens (b, 1 + N, D)."""
    blocks = getattr(model.trunk.blocks, "values", lambda: model.trunk.blocks)()
    tables = [model.trunk.rope_embed.tables(2, 4, 1)]
    x = run_blocks(enumerate(blocks), tokens.flatten(0, 1), (tuple(tokens.shape[:2]),), tables)
    return model.trunk.norm(x).view_as(tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov3", "dinov3_qkvb", "dinov3_plus"])
def test_timm_dinov3_gives_the_same_tokens(name):
    model, _, notes = started(name)
    cases = load_file(DATA / f"{name}_cases.safetensors")
    (tokens,) = model.trunk([cases["images"]])
    assert torch.allclose(tokens, cases["out"], atol=1e-5, rtol=1e-5)
    for teacher, student in model.averaged():
        assert torch.equal(teacher, student)
    assert any("trunk" in note for note in notes)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_giant", "openclip"])
def test_blocks_that_do_not_rotate(name):
    model = without_rotation(started(name)[0])
    cases = load_file(DATA / f"{name}_cases.safetensors")
    assert torch.allclose(stack(model, cases["tokens"]), cases["out"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_openclip_text_and_image_projection():
    model, tensors, notes = started("openclip")
    cases = load_file(DATA / "openclip_cases.safetensors")
    assert torch.allclose(model("encode_text", tokens=cases["text"]), cases["encode_text"], atol=1e-5)
    feature = torch.nn.functional.normalize(model.visual_proj(cases["out"][:, 0]), dim=-1)
    assert torch.allclose(feature, cases["image_feature"], atol=1e-5)
    assert tensors["logit_scale"].shape == (1,)
    left = "\n".join(note for note in notes if "left out" in note)
    assert "visual.positional_embedding" in left and "visual.ln_pre.weight" in left


def test_what_has_no_place_is_said():
    _, tensors, notes = started("dinov3_registers")
    assert any("register tokens" in note and "reg_token" in note for note in notes)
    assert any("drawn anew" in note and "text" in note and "pixel_decoder" in note for note in notes)
    notes = started("dinov2_giant")[2]
    left = "\n".join(notes)
    for name in ("pos_embed", "head.weight", "head.bias", "reg_token"):
        assert name in left


def test_openclip_text_alone_when_the_image_encoder_differs():
    config = replace(config_for("openclip"), vision=replace(TINY.vision, width=32, depth=2, heads=2))
    tensors, notes = read_initial(str(DATA / "openclip.safetensors"), config, OBJECTIVES)
    assert {name.split(".")[0] for name in tensors} == {"text", "logit_scale"}
    assert any("image encoder does not fit" in note and "visual.*" in note for note in notes)


def test_newer_openclip_names_wrappers_and_dtypes(tmp_path):
    state = load_file(DATA / "openclip.safetensors")
    visual = {f"module.{name}": t.half() for name, t in state.items() if name.startswith(("visual.", "logit"))}
    text = {f"module.text.{name}": t.half() for name, t in state.items() if f"module.{name}" not in visual}
    torch.save({"epoch": 3, "name": "x", "state_dict": visual | text}, tmp_path / "epoch_3.pt")
    plain = started("openclip")[1]
    tensors, _ = read_initial(str(tmp_path / "epoch_3.pt"), config_for("openclip"), OBJECTIVES)
    assert tensors.keys() == plain.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, plain[name].half().float())


def test_another_projection_width_keeps_the_initial_one(tmp_path):
    state = load_file(DATA / "openclip.safetensors")
    state["text_projection"], state["visual.proj"] = torch.zeros(32, 16), torch.zeros(32, 16)
    save_file(state, tmp_path / "clip.safetensors")
    tensors, notes = read_initial(str(tmp_path / "clip.safetensors"), config_for("openclip"), OBJECTIVES)
    assert "text.projection.weight" not in tensors and "visual_proj.weight" not in tensors
    assert any("text_projection" in note for note in notes)


def test_two_sources_one_after_the_other():
    spec = f"{DATA / 'openclip.safetensors'}, {DATA / 'dinov3.safetensors'}"
    tensors, notes = read_initial(spec, CONFIG, OBJECTIVES)
    assert {name.split(".")[0] for name in tensors} >= {"trunk", "text"}
    timm = started("dinov3")[1]
    assert all(torch.equal(tensors[name], timm[name]) for name in timm)


def test_a_tokenizer_as_the_start_of_training(tmp_path):
    source = VTP_DATA / "default"
    convert_tokenizer(source, "native", tmp_path / "ckpt")
    for path in (source, tmp_path / "ckpt"):
        tensors, notes = read_initial(str(path), TINY, OBJECTIVES)
        model = build_vtp(TINY, seed=7)
        before = {name: p.clone() for name, p in model.named_parameters()}
        fill(model, tensors)
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
        assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("dino_head."))
        assert all(torch.equal(teacher, student) for teacher, student in model.averaged())
        assert any("drawn anew" in note and "dino_head" in note for note in notes)
    tensors, notes = read_initial(str(source), TINY, {"reconstruction"})
    assert any("the objective that needs it is off" in note and "text" in note for note in notes)


def test_every_rank_takes_its_part():
    config = config_for("openclip")
    tensors, _ = read_initial(str(DATA / "openclip.safetensors"), config, OBJECTIVES)
    seen = set()
    for tp_rank, pp_rank in itertools.product(range(2), range(2)):
        mesh = Mesh(tp=2, pp=2, tp_rank=tp_rank, pp_rank=pp_rank)
        model = build_vtp(config, mesh, seed=1)
        fill(model, tensors)
        for name, parameter in model.named_parameters():
            if name in tensors:
                assert torch.equal(parameter, cut(tensors[name], shard_of(parameter), tp_rank, 2)), name
                seen.add(name)
        assert all(torch.equal(teacher, student) for teacher, student in model.averaged())
    assert seen == tensors.keys()


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("blocks.1.attn.proj.bias"), "missing trunk.blocks.1.attn.proj.bias"),
    (lambda s: s.update({"blocks.0.extra.weight": torch.zeros(2)}), "unexpected blocks.0.extra.weight"),
    (lambda s: s.update({"surplus": torch.zeros(2)}), "unexpected surplus"),
    (lambda s: s.update({"norm.bias": torch.zeros(2)}), r"trunk.norm.bias has shape \[2\], not \[32\]"),
])
def test_partial_files_are_refused(change, message, tmp_path):
    state = load_file(DATA / "dinov3.safetensors")
    change(state)
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=message):
        read_initial(str(tmp_path / "vit.safetensors"), CONFIG, OBJECTIVES)


def as_eva02(state, split=False):
    """With what the small EVA-02s of timm 1.0.31 have in its place (``split``: the larger ones)."""
    state = {name: tensor for name, tensor in state.items() if "gamma" not in name}
    state["pos_embed"] = torch.zeros(1, 17, 32)
    for block in (f"blocks.{i}" for i in range(2)):
        weight = state[f"{block}.attn.qkv.weight"]
        state |= {f"{block}.attn.{part}_bias": torch.zeros(32) for part in "qv"}
        if split:
            for part, own in zip("qkv", state.pop(f"{block}.attn.qkv.weight").chunk(3)):
                state[f"{block}.attn.{part}_proj.weight"] = own.contiguous()
            for part in "qv":
                state[f"{block}.attn.{part}_proj.bias"] = state.pop(f"{block}.attn.{part}_bias")
        else:
            assert len(weight) == 96
            for kind in ("weight", "bias"):
                halves = [state.pop(f"{block}.mlp.{name}.{kind}") for name in ("fc1_g", "fc1_x")]
                state[f"{block}.mlp.fc1.{kind}"] = torch.cat(halves)
    return state


@pytest.mark.parametrize("change, message", [
    (as_eva02, "is an EVA-02"), (lambda s: as_eva02(s, split=True), "is an EVA-02"),
    (lambda s: {**s, "rope.freqs": torch.zeros(2, 2, 32)}, "is a RoPE-ViT"),
    (lambda s: {**s, "blocks.0.attn.qkv.bias": torch.zeros(96)}, "is a RoPE-ViT"),
])
def test_models_that_rotate_otherwise(change, message, tmp_path):
    state = change(load_file(DATA / "dinov3_plus.safetensors"))
    save_file(state, tmp_path / "vit.safetensors")
    config = config_for("dinov3_plus")
    config = replace(config, vision=replace(config.vision, layer_scale=None)) if message.endswith("02") else config
    with pytest.raises(UserError, match=f"vit.safetensors {message}.*rotary positions"):
        read_initial(str(tmp_path / "vit.safetensors"), config, OBJECTIVES)
    # In an OpenCLIP model the image encoder is left out for it.
    clip = {name: t for name, t in load_file(DATA / "openclip.safetensors").items() if not name.startswith("visual.")}
    save_file(clip | {f"visual.trunk.{name}": t for name, t in state.items()}, tmp_path / "clip.safetensors")
    tensors, notes = read_initial(str(tmp_path / "clip.safetensors"), config, OBJECTIVES)
    assert not any(name.startswith("trunk.") for name in tensors) and any(message.split()[-1] in note for note in notes)


@pytest.mark.parametrize("name", ["dinov3", "dinov2_giant", "openclip"])
def test_what_the_rounding_of_the_rotation_costs_is_said(name):
    def notes(dtype):
        config = replace(config_for(name), rope_dtype=dtype)
        return [n for n in read_initial(str(DATA / f"{name}.safetensors"), config, OBJECTIVES)[1] if "rope_dtype" in n]

    assert notes("float32") == [] and "model.rope_dtype=float32 gives its numbers" in notes("bfloat16")[0]


def test_text_alone_needs_no_rotation():
    config = replace(config_for("openclip"), rope_dtype="bfloat16")
    notes = read_initial(str(DATA / "openclip.safetensors"), config, {"contrastive"})[1]
    assert any("rope_dtype" in note for note in notes)
    config = replace(config, vision=replace(TINY.vision, width=32, depth=2, heads=2))
    notes = read_initial(str(DATA / "openclip.safetensors"), config, {"contrastive"})[1]
    assert not any("rope_dtype" in note for note in notes)


HUGE = 1 << 38  # numbers: a tensor of 1 TB


@pytest.mark.parametrize("source, name", [
    ("openclip", "token_embedding.weight"), ("openclip", "visual.conv1.weight"), ("openclip", "text_projection"),
    ("dinov3", "patch_embed.proj.weight"), ("dinov3", "blocks.0.attn.qkv.weight"),
    ("dinov3_plus", "blocks.1.norm1.bias"), ("dinov2_giant", "blocks.0.mlp.fc1.weight"),
])
@pytest.mark.parametrize("change, message", [
    (lambda t: torch.zeros(1, dtype=torch.float16).expand(HUGE), "more numbers than are in the file"),
    (lambda t: torch.zeros(1, dtype=torch.float16).expand(HUGE, *t.shape[1:]), "more numbers than are in the file"),
    (lambda t: torch.zeros(HUGE, 0), "hold no numbers"), (lambda t: t.to("meta"), "no plain tensor"),
    (lambda t: t.char(), r"(?:unexpected|is of torch.int8)"), (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    (lambda t: t[..., :1].reshape(-1), "shape|unexpected"), (lambda t: t.flatten()[0], "shape|unexpected|missing"),
])
def test_tensors_that_are_no_weights(source, name, change, message, tmp_path):
    state = load_file(DATA / f"{source}.safetensors")
    state[name] = change(state[name])
    torch.save(state, tmp_path / "weights.pt")
    try:
        notes = read_initial(str(tmp_path / "weights.pt"), config_for(source), OBJECTIVES)[1]
    except UserError as error:
        said = str(error)
    else:  # of an OpenCLIP model what does not fit stays out
        said = next(note for note in notes if "the image encoder does not fit" in note or "text_projection" in note)
    assert re.search(message, said) and "\n" not in said


def test_all_faults_at_once_and_other_settings(tmp_path):
    with pytest.raises(UserError) as error:
        read_initial(str(DATA / "dinov3_plus.safetensors"), CONFIG, OBJECTIVES)
    found = re.findall(r"(?:missing|unexpected) trunk\.blocks\.\d\.mlp\.\w+", str(error.value))
    assert {name.split(".")[-1] for name in found} >= {"w1", "w2", "w3", "fc1", "fc2"}
    with pytest.raises(UserError, match="model.vision.heads is 2 there"):
        other = replace(TINY, vision=replace(TINY.vision, heads=4))
        read_initial(str(VTP_DATA / "default"), other, OBJECTIVES)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="neither of OpenCLIP nor a timm ViT"):
        read_initial(str(tmp_path / "other.safetensors"), CONFIG, OBJECTIVES)
    with pytest.raises(UserError, match="does not exist"):
        read_initial(str(tmp_path / "none.pt"), CONFIG, OBJECTIVES)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("timm", "open_clip", "torchvision"))), reason="needs timm and open_clip"
)
def test_stored_files_are_the_installed_libraries():
    spec = importlib.util.spec_from_file_location("make_init_from", DATA / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, (state, cases) in module.make().items():
        stored = load_file(DATA / f"{name}.safetensors")
        assert stored.keys() == state.keys(), name
        for key, value in (load_file(DATA / f"{name}_cases.safetensors") if cases else {}).items():
            assert torch.allclose(value.float(), cases[key].float(), atol=1e-4), (name, key)
