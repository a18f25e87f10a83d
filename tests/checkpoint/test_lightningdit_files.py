"""LightningDiT's own files: what its script wrote is read, what is partial is refused, and its latents train a DiT."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dit_oracle import DATA, OFFICIAL, stored
from vtp_oracle import DATA as VTP_DATA
from vtp_oracle import TINY

import megavtp
from megavtp.checkpoint.formats.convert import convert
from megavtp.checkpoint.formats.hf_vtp import save_folder
from megavtp.dit.checkpoint import load_dit
from megavtp.dit.config import complete_dit
from megavtp.dit.lightningdit import POSITIONS, read_lightningdit
from megavtp.dit.lightningdit_config import dit_shapes
from megavtp.errors import UserError
from megavtp.latents.artifact import FILE, LatentStatistics, TokenizerArtifact, check_same_tokenizer
from megavtp.latents.folder import LatentFolder
from megavtp.models.build import build_vtp

TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """What LightningDiT's script saved, with an optimizer. So that it packs, the numbers of each tensor but the
    position tables are its number in the file."""
    path = tmp_path_factory.mktemp("official") / "0000001.pt"
    with zipfile.ZipFile(DATA / "checkpoint.zip") as packed, zipfile.ZipFile(path, "w") as plain:
        for name in packed.namelist():
            plain.writestr(name, packed.read(name))
    return path


@pytest.fixture
def tree() -> dict:
    """A checkpoint to change: a prefix on the model's keys only, the settings as the YAML files have them."""
    state = stored("state")
    return {
        "model": {f"module.{name}": tensor for name, tensor in state.items()}, "ema": dict(state),
        "config": {"model": {"depth": 2, "num_heads": 2, "in_chans": 8}, "data": {"num_classes": 10}},
    }


def in_both(change):
    """``change`` of a state dict, in both parts of a checkpoint."""

    def of_tree(tree):
        tree["model"] = {name.removeprefix("module."): tensor for name, tensor in tree["model"].items()}
        for part in ("model", "ema"):
            change(tree[part])

    return of_tree


def without_block(state, number=1):
    for name in [name for name in state if name.startswith(f"blocks.{number}.")]:
        del state[name]


def renumbered(state):
    for name in [name for name in state if name.startswith("blocks.1.")]:
        state[name.replace("blocks.1.", "blocks.2.")] = state.pop(name)


def fewer_rows(count):
    return in_both(lambda state: state.update({TABLE: state[TABLE][:-count]}))


def replaced(name, *shape):
    return in_both(lambda state: state.update({name: torch.zeros(shape)}))


def test_what_the_official_script_saved(official, tmp_path):
    found = read_lightningdit(official)
    assert replace(found.config, size=OFFICIAL.size) == complete_dit(OFFICIAL)
    assert (found.step, found.notes) == (1, [])
    tree = torch.load(official, weights_only=True)
    assert set(tree) == {"model", "ema", "opt", "config"} and all(name.startswith("module.") for name in tree["model"])
    for part, prefix, own in (("model", "module.", found.weights), ("ema", "", found.average)):
        assert {prefix + name for name in (*own, *POSITIONS)} == tree[part].keys()
        assert all(torch.equal(tensor, tree[part][prefix + name]) for name, tensor in own.items())
    convert(official, "native", tmp_path / "native")
    convert(tmp_path / "native", "lightningdit", tmp_path / "back.pt")
    back = read_lightningdit(tmp_path / "back.pt")
    assert back.notes == []
    assert all(torch.equal(tensor, back.average[name]) for name, tensor in found.average.items())


@pytest.mark.parametrize("change, parts", [
    (in_both(without_block), ["(model) missing blocks.1.norm1.weight", "says depth 2, the tensors 1"]),
    (in_both(renumbered), ["missing blocks.1.attn.qkv.bias", "unexpected blocks.2.attn.qkv.bias"]),
    (fewer_rows(1), ["class_dropout_prob=0"]),
    (fewer_rows(3), ["says num_classes 10, the tensors 7"]),
    (lambda t: t["config"]["model"].update(num_heads=4), ["says heads 4, the tensors 2"]),
    (lambda t: t["config"]["model"].update(model_type="LightningDiT-B/1"), ["says width 768, the tensors 144"]),
    (replaced("x_embedder.proj.weight", 5), ["x_embedder.proj.weight has shape [5], not 4 dimensions"]),
    (replaced("x_embedder.proj.weight", 144, 8, 0, 0), ["x_embedder.proj.weight has shape [144, 8, 0, 0]"]),
    (replaced("pos_embed", 5), ["pos_embed has shape [5], not 3 dimensions"]),
    (replaced("feat_rope.freqs_cos"), ["feat_rope.freqs_cos has shape [], not 2 dimensions"]),
    (replaced("blocks.0.adaLN_modulation.1.weight"), ["(model) blocks.0.adaLN_modulation.1.weight has shape []"]),
    (replaced("blocks.x.y", 1), ["(model) unexpected blocks.x.y", "(ema) unexpected blocks.x.y"]),
    (
        in_both(lambda s: (s.pop("pos_embed"), s.pop("blocks.0.mlp.w3.bias"), s.update(more=torch.zeros(1)))),
        ["(model) missing pos_embed; missing blocks.0.mlp.w3.bias; unexpected more", "(ema) missing pos_embed"],
    ),
    (
        lambda t: (t["ema"].pop("blocks.1.attn.qkv.bias"), t["model"].update({"module.more": torch.zeros(1)})),
        ["(model) unexpected more", "(ema) missing blocks.1.attn.qkv.bias"],
    ),
    (in_both(lambda s: [s.pop(name) for name in POSITIONS[1:]]), ["use_rope=false"]),
    (lambda t: t.update(ema={}), ["its 'ema' is no state dict"]),
    (lambda t: t.update(ema={"a": 1}), ["its 'ema' is no state dict"]),
    (lambda t: t.update(model=None), ["its 'model' is no state dict"]),
])
def test_partial_files_are_refused(tree, change, parts, tmp_path):
    change(tree)
    torch.save(tree, tmp_path / "bad.pt")
    with pytest.raises(UserError) as error:
        read_lightningdit(tmp_path / "bad.pt")
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_states_nothing_is_taken_by_its_tensors(tree, tmp_path):
    del tree["config"]
    torch.save(tree, tmp_path / "0000001.pt")
    (note,) = read_lightningdit(tmp_path / "0000001.pt").notes
    assert "does not state its depth, heads, num_classes" in note
    in_both(without_block)(tree)
    torch.save(tree, tmp_path / "0000002.pt")
    assert read_lightningdit(tmp_path / "0000002.pt").config.depth == 1


def test_sizes_that_make_no_dit(tmp_path):
    """All shapes fit one another, but heads of six channels take no rotary positions."""
    shapes = dit_shapes(replace(OFFICIAL, width=6, heads=1))
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd.pt.*heads of 6 channels"):
        read_lightningdit(tmp_path / "odd.pt")


def test_prefix_for_lightningdits_own_training(official, tmp_path):
    convert(official, "native", tmp_path / "native")
    convert(tmp_path / "native", "lightningdit", tmp_path / "dit.pt", module_prefix=True)
    before, after = (torch.load(path, weights_only=True) for path in (official, tmp_path / "dit.pt"))
    for part in ("model", "ema"):
        assert before[part].keys() == after[part].keys()
        for name, tensor in before[part].items():  # position tables may differ in the last bit
            torch.testing.assert_close(after[part][name], tensor, rtol=0, atol=1e-6 if name.endswith(POSITIONS) else 0)
    with pytest.raises(UserError, match="--module-prefix is for --to lightningdit"):
        convert(official, "native", tmp_path / "x", module_prefix=True)


def test_a_dit_takes_no_other_tokenizer(official, tmp_path):
    statistics = LatentStatistics((0.1,) * 8, (0.7,) * 8, 100)
    own = TokenizerArtifact("f" * 64, 64, 16, 8, statistics=statistics)
    others = {
        "own": own, "other": replace(own, fingerprint="0" * 64),
        "scaled": replace(own, statistics=replace(statistics, std=(0.8,) * 8)),
    }
    for name, artifact in others.items():
        (tmp_path / name).mkdir()
        artifact.write(tmp_path / name)
    convert(official, "native", tmp_path / "dit", tokenizer=tmp_path / "own")
    for name, message in (("other", "different tokenizers"), ("scaled", "different latent statistics")):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "dit", "native", tmp_path / "x", tokenizer=tmp_path / name)
    # The same statistics by way of LightningDiT's file, which is of float32.
    statistics.write(tmp_path / "latents_stats.pt")
    rounded = LatentStatistics.read(tmp_path / "latents_stats.pt")
    assert rounded.mean != statistics.mean
    check_same_tokenizer(own, "one", replace(own, statistics=rounded), "other")
    replace(own, statistics=rounded).write(tmp_path / "own")
    convert(tmp_path / "dit", "native", tmp_path / "again", tokenizer=tmp_path / "own")
    assert load_dit(tmp_path / "again").artifact.statistics == rounded


def test_a_wrong_form_is_named(tmp_path):
    convert(VTP_DATA / "default", "native", tmp_path / "vtp")
    for path in (tmp_path / "vtp", VTP_DATA / "default"):
        with pytest.raises(UserError, match="is a folder, a LightningDiT is a .pt file"):
            convert(path, "native", tmp_path / "x", source_format="lightningdit")


def test_latents_that_lightningdit_made(tmp_path):
    """They train a DiT with the facts of a tokenizer that was converted with their statistics beside them."""
    config = replace(TINY, bottleneck=8)
    save_folder(tmp_path / "vtp", config, build_vtp(config, objectives={"reconstruction"}).state_dict())
    latents = shutil.copytree(DATA / "dataset", tmp_path / "latents")
    with pytest.raises(UserError, match="visual_tokenizer.json is missing"):
        LatentFolder(latents)
    convert(tmp_path / "vtp", "hf-vtp", tmp_path / "vtp-hf", statistics=latents / "latents_stats.pt")
    shutil.copyfile(tmp_path / "vtp-hf" / FILE, latents / FILE)
    folder = LatentFolder(latents)
    assert sum(folder.shard_counts) == 16 and folder.shape[0] == 8 and folder.has_flips
    assert folder.artifact == megavtp.load_tokenizer(tmp_path / "vtp-hf").artifact
    items = stored("items")["features"]  # as the official reader gives them, of images and mirrored images
    places = [(shard, row) for shard, count in enumerate(folder.shard_counts) for row in range(count)]
    for place, item in zip(places, items, strict=True):
        both = (folder.statistics.normalise(folder.read(*place, flip).latents) for flip in (False, True))
        assert any(torch.allclose(own, item, atol=1e-5) for own in both)
