import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vtp_oracle import DATA, TINY

from megavtp.checkpoint.formats.hf_vtp import (
    from_official,
    load_folder,
    load_tensors,
    official_shapes,
    save_folder,
    to_official,
)
from megavtp.checkpoint.formats.hf_vtp_config import config_from_official, config_to_official
from megavtp.checkpoint.formats.vtp_source import open_vtp
from megavtp.config.schema import ModelConfig
from megavtp.config.sizes import resolve_model
from megavtp.conversion import convert
from megavtp.errors import UserError
from megavtp.models.build import build_vtp, load_full

PUBLIC = {"contrastive", "reconstruction"}


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "vtp"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DATA / "default" / name, target / name)
    return target


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_names_and_shapes_of_the_released_sizes(size):
    spec = json.loads((DATA / "specs" / f"{size}.json").read_text())
    shapes = official_shapes(resolve_model(ModelConfig(size=size)))
    assert shapes == spec["tensors"]
    counts = [torch.Size(shape).numel() for name, shape in shapes.items() if name not in spec["bfloat16"]]
    assert sum(counts) == spec["params"]
    assert {name for name in shapes if name.endswith("periods")} == set(spec["bfloat16"])


def test_load_then_save_is_the_same_folder(folder, tmp_path):
    config, tensors = load_folder(folder)
    model = build_vtp(config, objectives=PUBLIC)
    load_full(model, tensors)
    save_folder(tmp_path / "out", config, model.state_dict())
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    before, after = load_tensors(folder), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_training_model_exports_without_teacher_and_head(tmp_path):
    model = build_vtp(TINY, seed=4)
    state = {name: p.detach() for name, p in model.named_parameters()}  # no buffers: the periods follow from the config
    save_folder(tmp_path, TINY, state)
    config, tensors = load_folder(tmp_path)
    assert config == replace(TINY, size="b", dino_head=config.dino_head)
    own = model.state_dict()
    assert tensors.keys() == {name for name in own if not name.startswith(("teacher.", "dino_head."))}
    assert all(torch.equal(tensor, own[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("objectives", [{"contrastive"}, {"reconstruction"}])
def test_one_sided_models(objectives, tmp_path):
    model = build_vtp(TINY, objectives=objectives)
    save_folder(tmp_path, TINY, model.state_dict())
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["train_clip"] == ("contrastive" in objectives) != data["train_reconstruction"]
    assert load_folder(tmp_path)[1].keys() == model.state_dict().keys()


VARIANT = replace(
    TINY, bottleneck_reconstruction_only=False, init_logit_scale=3.0, init_logit_bias=-10.0,
    vision=replace(TINY.vision, ffn="mlp", norm="layernormbf16", layer_scale=0.1, qk_norm=True, clip_feature="pooled"),
    text=replace(TINY.text, layer_scale=0.2, causal=False, pool="last", projection_bias=True, quick_gelu=True),
    decoder=replace(TINY.decoder, ffn="swiglu64", norm="rmsnorm", layer_scale=0.3, qk_norm=True),
)


def test_every_option_round_trips():
    model = build_vtp(VARIANT, objectives=PUBLIC)
    official = to_official(model.state_dict(), VARIANT)
    for name in (
        "trunk.blocks.0.attn.q_norm.weight", "trunk.blocks.0.ls1.gamma", "trunk.blocks.0.mlp.fc1.bias", "logit_bias",
        "text_transformer.resblocks.1.ls_2.gamma", "text_transformer.resblocks.0.attn.in_proj_bias",
        "text_projection.weight", "text_projection.bias", "pixel_decoder.blocks.1.ls2.gamma", "trunk.norm.bias",
    ):
        assert name in official
    config = config_from_official(json.loads(json.dumps(config_to_official(VARIANT))))
    assert config == replace(VARIANT, size="b", dino_head=config.dino_head)
    back = from_official(official, config)
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_text_projection_is_stored_transposed():
    state = build_vtp(TINY, objectives=PUBLIC).state_dict()
    official = to_official(state, TINY)
    assert torch.equal(official["text_projection"], state["text.projection.weight"].T)
    assert official["logit_scale"].shape == ()


def test_missing_keys_take_the_official_defaults():
    config = config_from_official({"model_type": "vtp"})
    assert config == replace(resolve_model(ModelConfig(size="b")), text=config.text)
    assert config.text == resolve_model(ModelConfig(size="b")).text
    assert config_from_official({"model_type": "vtp", "init_logit_scale": 0, "vision_init_values": 0.0}) == config


def test_half_precision_and_vector_scale_files_load(folder):
    edit_config(folder, nonscalar_logit_scale=True)

    def change(tensors):
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        tensors["ln_final.weight"] = tensors["ln_final.weight"].bfloat16()

    edit_tensors(folder, change)
    tensors = load_folder(folder)[1]
    assert tensors["text.norm.weight"].dtype == torch.float32
    assert tensors["trunk.rope_embed.periods"].dtype == torch.bfloat16


def test_what_only_the_released_folder_says_is_written_back(folder, tmp_path):
    """Byte for byte, by way of every form, as VTP-Large says it: 4 for 4.0, and another version of transformers."""
    said = {"nonscalar_logit_scale": True, "text_pad_id": 7, "vision_mlp_ratio": 4, "transformers_version": "4.56.0"}
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}, indent=2) + "\n")
    tensors = load_file(folder / "model.safetensors")
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    steps = [(folder.name, "native", "native"), ("native", "native", "again"), ("again", "hf-vtp", "back")]
    for one, form, other in (*steps, ("back", "hf-vtp", "hf")):
        convert(tmp_path / one, form, tmp_path / other)
    for name in ("config.json", "model.safetensors"):
        for out in ("back", "hf"):
            assert (tmp_path / out / name).read_bytes() == (folder / name).read_bytes(), name


def test_another_decoder_is_said_as_it_is(folder, tmp_path):
    """What the released folder of the encoder said of its own decoder is not written over that of the new one."""
    convert(folder, "native", tmp_path / "encoder")
    source = open_vtp(tmp_path / "encoder")
    config = replace(source.config.model, decoder=replace(source.config.model.decoder, qk_norm=True))
    save_folder(tmp_path / "other", config, build_vtp(config, objectives={"reconstruction"}).state_dict() | {
        name: tensor for name, tensor in source.tensors.items() if name.startswith("trunk.")
    })
    convert(tmp_path / "encoder", "hf-vtp", tmp_path / "out", decoder=tmp_path / "other")
    assert json.loads((tmp_path / "out/config.json").read_text())["decoder_use_qk_norm"] is True
    load_folder(tmp_path / "out")


@pytest.mark.parametrize("nonscalar, shape", [(True, ()), (False, (1,)), (True, (2,))])
def test_a_scale_of_another_shape_than_its_config_says(folder, nonscalar, shape):
    edit_config(folder, nonscalar_logit_scale=nonscalar)
    edit_tensors(folder, lambda tensors: tensors.update(logit_scale=torch.ones(shape)))
    with pytest.raises(UserError, match=r"logit_scale has shape"):
        load_folder(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_numbers_that_are_no_weights(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({"ln_final.bias": tensors["ln_final.bias"].to(dtype)}))
    with pytest.raises(UserError, match=f"ln_final.bias is of {dtype}"):
        load_folder(folder)


def test_every_wrong_tensor_is_listed(folder):
    def change(tensors):
        tensors["surplus"] = tensors.pop("trunk.cls_token")
        del tensors["text_projection"]
        tensors["ln_final.weight"] = torch.zeros(3)

    edit_tensors(folder, change)
    with pytest.raises(UserError) as error:
        load_folder(folder)
    for part in (
        "missing trunk.cls_token", "missing text_projection", "unexpected surplus",
        "ln_final.weight has shape [3], not [64]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("values, message", [
    ({"text_embed_cls": True}, "text_embed_cls"),
    ({"model_type": "clip"}, "model_type"),
    ({"vision_depth": "12"}, "vision_depth"),
    ({"vision_depth": 0}, "vision_depth"),
    ({"vision_depth": True}, "vision_depth"),
    ({"vision_ffn_layer": "moe"}, "vision_ffn_layer"),
    ({"text_pool_type": ["argmax"]}, "text_pool_type"),
    ({"vision_mlp_ratio": None}, "vision_mlp_ratio"),
    ({"vision_num_heads": 3}, "heads"),
    ({"vision_patch_size": 8}, "vision_patch_size"),
    ({"vision_depth": 4}, "missing trunk.blocks.3"),
    ({"train_reconstruction": False}, "unexpected pixel_decoder"),
])
def test_bad_configs(folder, values, message):
    edit_config(folder, **values)
    with pytest.raises(UserError, match=message) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_and_missing_files(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(UserError, match=name):
        load_folder(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_folder(folder)


@pytest.mark.parametrize("change, message", [
    ({"rope_dtype": "float32"}, "rope_dtype"), ({"patch_size": 8}, "patch_size"),
])
def test_what_the_format_cannot_say_is_refused(change, message, tmp_path):
    config = replace(TINY, **change)
    with pytest.raises(UserError, match=message):
        save_folder(tmp_path / "out", config, build_vtp(config, objectives=PUBLIC).state_dict())
    assert not (tmp_path / "out").exists()
