"""Conversions there and back, what a conversion carries along, and what happens to wrong files."""

import json
import os
import pickle
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dit_oracle import OFFICIAL
from dit_oracle import stored as stored_dit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vtp_oracle import DATA, TINY, assert_equals, assert_matches_oracle, stored

import megavtp
from megavtp.checkpoint.formats.convert import write_native
from megavtp.checkpoint.formats.vtp_source import open_vtp
from megavtp.checkpoint.store import open_checkpoint
from megavtp.config.schema import Config, DataConfig
from megavtp.conversion import convert
from megavtp.data.captions import load_tokenizer as load_captions
from megavtp.data.captions import train_sentencepiece
from megavtp.dit.checkpoint import load_dit
from megavtp.dit.config import DiTModelConfig, complete_dit, resolve_dit
from megavtp.dit.lightningdit import dit_shapes, read_lightningdit
from megavtp.errors import UserError
from megavtp.evaluation.tokenizer.checkpoint import find_tokenizer, open_model
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact, check_same_tokenizer
from megavtp.models.build import build_vtp, load_full

ROOT = Path(__file__).parents[2]


def tensors_of(folder, prefix="model/"):
    with open_checkpoint(folder) as checkpoint:
        return {n: checkpoint.tensor(n).clone() for n in checkpoint.names if n.startswith(prefix)}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's checkpoint with teacher, head and own captions, as training writes it but for the moments."""
    folder = tmp_path_factory.mktemp("run")
    train_sentencepiece(["a red cat", "two dogs", "the sun", "green tree"], folder / "captions.model")
    vocabulary = load_captions(str(folder / "captions.model"), folder, 16).vocab_size
    model_config = replace(TINY, text=replace(TINY.text, vocab_size=vocabulary))
    model = build_vtp(model_config, seed=3)
    with torch.no_grad():  # a teacher that has moved on
        for teacher, _ in model.averaged():
            teacher.mul_(0.5)
    config = Config(model=model_config, data=DataConfig(root=str(folder)))
    write_native(folder / "step", 5, {f"model/{n}": p.detach() for n, p in model.named_parameters()}, config)
    return folder / "step"


@pytest.mark.parametrize("variant", ["default", "clip_only"])
def test_official_to_native_and_back_is_the_same_folder(variant, tmp_path):
    convert(DATA / variant, "native", tmp_path / "native")
    convert(tmp_path / "native", "hf-vtp", tmp_path / "hf")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (DATA / variant / name).read_bytes(), name
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_native_to_official_and_back_keeps_every_bit(trained, tmp_path):
    notes = convert(trained, "hf-vtp", tmp_path / "hf")
    assert any("dino_head" in note and "teacher" in note for note in notes)
    convert(tmp_path / "hf", "native", tmp_path / "native")
    before, after = tensors_of(trained), tensors_of(tmp_path / "native")
    same({n: t for n, t in before.items() if not n.startswith(("model/teacher.", "model/dino_head."))}, after)
    for folder in (tmp_path / "hf", tmp_path / "native"):
        assert (folder / "captions.model").read_bytes() == (trained.parent / "captions.model").read_bytes()
    own = megavtp.load_tokenizer(tmp_path / "native")
    assert own.model.objectives == {"contrastive", "reconstruction"}
    # Texts go through the caption tokenizer that came along.
    texts = ["a red cat", "two dogs"]
    before = megavtp.load_tokenizer(trained).encode_text(texts)
    for folder in (tmp_path / "hf", tmp_path / "native"):
        features = megavtp.load_tokenizer(folder).encode_text(texts)
        assert torch.equal(features, before) and not torch.allclose(features[0], features[1], atol=1e-3)


def test_evaluation_finds_the_captions_that_came_along(trained, tmp_path):
    for form in ("hf-vtp", "native"):
        convert(trained, form, tmp_path / form)
        model, config = open_model(tmp_path / form, torch.device("cpu"))
        tokenizer = find_tokenizer(model, config, tmp_path, None)
        assert tokenizer.vocab_size == model.config.text.vocab_size


def test_native_to_native_keeps_the_teacher(trained, tmp_path):
    convert(trained, "native", tmp_path / "copy")
    same(tensors_of(trained), tensors_of(tmp_path / "copy"))
    source = open_vtp(tmp_path / "copy")
    model = build_vtp(source.config.model)
    load_full(model, source.tensors)
    parameters = dict(model.named_parameters())
    name = "trunk.blocks.0.attn.qkv.weight"
    assert torch.equal(parameters[f"teacher.{name}"], 0.5 * parameters[name])


@torch.no_grad()
@pytest.mark.parametrize("form", ["hf-vtp", "native"])
def test_oracle_outputs_through_every_form(form, tmp_path):
    path = DATA / "default"
    if form == "native":
        convert(path, "native", tmp_path / "ckpt")
        path = tmp_path / "ckpt"
    tokenizer = megavtp.load_tokenizer(path)
    inputs, outputs = stored("oracle_in"), stored("default/oracle_out")
    assert_matches_oracle(tokenizer.model("encode", images=inputs["image"]), outputs["latents"])
    assert_matches_oracle(tokenizer.model("decode", latents=outputs["latents"]), outputs["decoded"])
    assert_equals(tokenizer.model("encode_image", images=inputs["image"]), outputs["clip_img"])
    assert_equals(tokenizer.encode_text(inputs["text"]), outputs["clip_txt"])


def test_the_artifact_says_the_same_in_every_form(trained, tmp_path):
    convert(trained, "hf-vtp", tmp_path / "hf")
    one, other = megavtp.load_tokenizer(trained).artifact, megavtp.load_tokenizer(tmp_path / "hf").artifact
    assert one == other == TokenizerArtifact.read(tmp_path / "hf")
    assert one.captions == "captions.model" and len(one.fingerprint) == 64
    check_same_tokenizer(one, "a", other, "b")
    stranger = megavtp.load_tokenizer(DATA / "default").artifact
    with pytest.raises(UserError, match="different tokenizers"):
        check_same_tokenizer(one, "a", stranger, "b")


def test_an_artifact_of_other_weights_is_refused(trained, tmp_path):
    convert(trained, "hf-vtp", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["trunk.norm.weight"] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other weights"):
        megavtp.load_tokenizer(tmp_path / "hf")


def test_a_fine_tuned_decoder_keeps_the_fingerprint(trained, tmp_path):
    convert(trained, "hf-vtp", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["pixel_decoder.norm.weight"] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    assert megavtp.load_tokenizer(tmp_path / "hf").artifact.fingerprint


def test_statistics_travel_with_the_tokenizer(tmp_path):
    statistics = LatentStatistics(tuple(0.5 * i for i in range(16)), tuple(1.0 + i for i in range(16)))
    statistics.write(tmp_path / "latents_stats.pt")
    convert(DATA / "default", "native", tmp_path / "ckpt", statistics=tmp_path / "latents_stats.pt")
    convert(tmp_path / "ckpt", "hf-vtp", tmp_path / "hf")
    assert megavtp.load_tokenizer(tmp_path / "hf").statistics == statistics
    LatentStatistics((0.0,), (1.0,)).write(tmp_path / "one.pt")
    with pytest.raises(UserError, match="statistics of 1 channels"):
        convert(DATA / "default", "native", tmp_path / "x", statistics=tmp_path / "one.pt")


# LightningDiT


@pytest.fixture(scope="module")
def official_dit(tmp_path_factory):
    """As the official script saves it: a prefix on the model's keys only, an optimizer, the settings."""
    state = stored_dit("state")
    average = {name: t * 0.5 if "blocks" in name else t for name, t in state.items()}
    path = tmp_path_factory.mktemp("dit") / "0000030.pt"
    torch.save({
        "model": {f"module.{name}": tensor for name, tensor in state.items()}, "ema": average,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "config": {"model": {}},
    }, path)
    return path


def test_lightningdit_to_native_and_back(official_dit, tmp_path):
    convert(official_dit, "native", tmp_path / "native")
    stored_model = load_dit(tmp_path / "native", average=False)
    assert stored_model.step == 30 and stored_model.artifact is None
    assert replace(stored_model.config.model, size=OFFICIAL.size) == complete_dit(OFFICIAL)
    state = stored_dit("state")
    for name, parameter in stored_model.model.named_parameters():
        assert torch.equal(parameter, state[name]), name
    convert(tmp_path / "native", "lightningdit", tmp_path / "dit.pt")
    before, after = (torch.load(p, weights_only=True) for p in (official_dit, tmp_path / "dit.pt"))
    same({name.removeprefix("module."): t for name, t in before["model"].items()}, after["model"])
    same(before["ema"], after["ema"])
    assert after["config"]["model"]["in_channels"] == 8


def test_native_dit_to_lightningdit_and_back_keeps_every_bit(official_dit, tmp_path):
    convert(official_dit, "native", tmp_path / "a")
    convert(tmp_path / "a", "lightningdit", tmp_path / "folder")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["0000030.pt"]
    convert(tmp_path / "folder/0000030.pt", "native", tmp_path / "b")
    same(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))


def test_bare_state_dicts_and_prefixes(official_dit, tmp_path):
    state = stored_dit("state")
    save_file(state, tmp_path / "bare.safetensors")
    torch.save({"ema": {f"module.module.{n}": t for n, t in state.items()}}, tmp_path / "wrapped.pt")
    for name in ("bare.safetensors", "wrapped.pt"):
        found = read_lightningdit(tmp_path / name)
        assert any("only one set" in note for note in found.notes)
        same(found.average, found.weights)
        assert all(torch.equal(tensor, state[n]) for n, tensor in found.weights.items())


@pytest.mark.parametrize("size", ["b", "xl"])
def test_official_shapes(size):
    config = DiTModelConfig(size=size, patch_size=1, latent_size=16, latent_channels=64, num_classes=1000)
    expected = json.loads((ROOT / "tests/data/lightningdit" / f"{size}_shapes.json").read_text())
    assert dit_shapes(resolve_dit(config)) == expected


def test_a_dit_knows_its_tokenizer(official_dit, tmp_path):
    statistics = LatentStatistics((0.0,) * 8, (1.0,) * 8)
    artifact = TokenizerArtifact("f" * 64, 64, 16, 8, statistics=statistics)
    artifact.write(tmp_path)
    convert(official_dit, "native", tmp_path / "native", tokenizer=tmp_path)
    assert load_dit(tmp_path / "native").artifact == artifact
    replace(artifact, statistics=None).write(tmp_path)
    with pytest.raises(UserError, match="no latent statistics"):
        convert(official_dit, "native", tmp_path / "x", tokenizer=tmp_path)


class Hostile:
    def __reduce__(self):
        return os.system, ("exit 3",)


@pytest.mark.parametrize("change, message", [
    (lambda t: t["ema"].pop("blocks.1.attn.qkv.bias"), r"\(ema\).*missing blocks.1.attn.qkv.bias"),
    (lambda t: t["model"].update({"module.more": torch.zeros(1)}), r"\(model\).*unexpected more"),
    (lambda t: t["ema"].update({"t_embedder.mlp.0.bias": torch.zeros(3)}), r"t_embedder.mlp.0.bias has shape \[3\]"),
    (lambda t: t["ema"].pop("feat_rope.freqs_cos"), r"\(ema\) missing feat_rope.freqs_cos"),
    (lambda t: t["ema"].update({"pos_embed": torch.ones_like(t["ema"]["pos_embed"])}), "fixed position table"),
    (lambda t: t["ema"].pop("x_embedder.proj.weight"), r"\(ema\) missing x_embedder.proj.weight"),
    (lambda t: t.update({"opt": Hostile()}), "refused: it holds more than tensors .*posix.system"),
    (lambda t: t.clear(), "neither model nor ema"),
])
def test_wrong_dit_files(official_dit, change, message, tmp_path):
    tree = torch.load(official_dit, weights_only=True)
    change(tree)
    torch.save(tree, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=message) as error:
        convert(tmp_path / "bad.pt", "native", tmp_path / "deep/out")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]


def test_plain_pickles_and_rubbish_are_refused(tmp_path):
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": Hostile()}))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("pickle.pt", "text.pt", "empty.pt"):
        with pytest.raises(UserError, match=name):
            convert(tmp_path / name, "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Errors


def official_copy(tmp_path, change):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copyfile(DATA / "default/config.json", folder / "config.json")
    tensors = load_file(DATA / "default/model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_every_wrong_tensor_is_listed_and_nothing_is_left(tmp_path):
    def change(tensors):
        tensors["surplus"] = tensors.pop("trunk.cls_token")
        tensors["ln_final.weight"] = torch.zeros(3)

    folder = official_copy(tmp_path, change)
    with pytest.raises(UserError) as error:
        convert(folder, "native", tmp_path / "new/out")
    for part in ("missing trunk.cls_token", "unexpected surplus", "ln_final.weight has shape [3], not [64]"):
        assert part in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_another_rope_table_has_no_native_form(tmp_path):
    folder = official_copy(tmp_path, lambda t: t["trunk.rope_embed.periods"].mul_(2))
    with pytest.raises(UserError, match="trunk.rope_embed.periods"):
        convert(folder, "native", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_folder_named_after_another_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="of step 0, --out step-00000300 says another: name it step-00000000"):
        convert(DATA / "default", "native", tmp_path / "step-00000300")
    assert list(tmp_path.iterdir()) == []
    convert(DATA / "default", "native", tmp_path / "step-00000000")
    assert open_vtp(tmp_path / "step-00000000").step == 0


@pytest.mark.parametrize("change", [{"patch_size": 32}, {"latent_channels": 8}])
def test_facts_of_other_sizes_than_the_weights_are_refused(change, tmp_path):
    convert(DATA / "default", "native", tmp_path / "out")
    replace(TokenizerArtifact.read(tmp_path / "out"), **change).write(tmp_path / "out")
    with pytest.raises(UserError, match="has other patches or latent channels than the model"):
        open_vtp(tmp_path / "out")


def test_a_failure_while_writing_leaves_nothing(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megavtp.checkpoint.formats.hf_vtp.write_atomic", full)
    with pytest.raises(UserError, match="No space left"):
        convert(DATA / "default", "hf-vtp", tmp_path / "out")
    monkeypatch.setattr("megavtp.checkpoint.store.write_tensors", full)
    with pytest.raises(UserError, match="No space left|disk space"):
        convert(DATA / "default", "native", tmp_path / "a/out")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_together(trained, official_dit, tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        ((tmp_path / "none", "native", out), "does not exist"),
        ((tmp_path, "native", out), "neither checkpoint.json nor config.json"),
        ((trained, "lightningdit", out), "is a tokenizer"),
        ((official_dit, "hf-vtp", out), "is a DiT"),
        ((trained, "hf-vtp", DATA), "exists"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*arguments)
    (trained.parent / "captions.model").rename(tmp_path / "moved.model")
    try:
        with pytest.raises(UserError, match="--captions"):
            convert(trained, "hf-vtp", out)
        convert(trained, "hf-vtp", out, captions=str(tmp_path / "moved.model"))
        assert (out / "captions.model").is_file()
        convert(trained, "hf-vtp", tmp_path / "without", captions="none")
        assert TokenizerArtifact.read(tmp_path / "without").captions is None
    finally:
        (tmp_path / "moved.model").rename(trained.parent / "captions.model")


def test_the_command(tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
        return end.value.code, capsys.readouterr()

    status, said = command("--from", DATA / "default", "--to", "native", "--out", tmp_path / "ckpt")
    assert status == 0 and f"wrote {tmp_path / 'ckpt'}" in said.out and "note: weights only" in said.out
    status, said = command("--from", tmp_path / "none", "--to", "native", "--out", tmp_path / "x")
    assert status == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
    (tmp_path / "ckpt/config.json").write_text("{}")  # a folder with the files of two forms
    status, said = command(
        "--from", tmp_path / "ckpt", "--from-format", "hf-vtp", "--to", "native", "--out", tmp_path / "x"
    )
    assert status == 2 and "model_type" in said.err
