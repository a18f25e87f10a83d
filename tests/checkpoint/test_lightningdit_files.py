"""LightningDiT's own files: what its script wrote is read, what is partial is refused, and its latents train a DiT."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dit_oracle import DATA, OFFICIAL, stored
from safetensors.torch import save_file
from vtp_oracle import DATA as VTP_DATA
from vtp_oracle import TINY

import megavtp
from megavtp.checkpoint.formats.hf_vtp import save_folder
from megavtp.conversion import convert
from megavtp.dit.checkpoint import load_dit
from megavtp.dit.config import complete_dit
from megavtp.dit.lightningdit import dit_shapes, read_lightningdit
from megavtp.dit.model.positions import POSITIONS
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
    assert replace(found.config.model, size=OFFICIAL.size) == complete_dit(OFFICIAL)
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
    assert read_lightningdit(tmp_path / "0000002.pt").config.model.depth == 1


def averaged(table, steps):
    """What LightningDiT's moving average, of all parameters and in float32, makes of one that never changes."""
    average = table.clone()
    for _ in range(steps):
        average.mul_(0.9999).add_(table, alpha=1 - 0.9999)
    return average


@pytest.mark.parametrize("steps, off", [(300, "2e-05"), (6000, "0.0002")])
@pytest.mark.parametrize("form", ["whole", "ema alone", "bare ema", "model alone", "started from an average"])
def test_the_average_of_the_position_table_shrinks(tree, form, steps, off, tmp_path):
    table = tree["ema"]["pos_embed"].clone()
    tree["ema"]["pos_embed"] = averaged(table, steps)
    assert (tree["ema"]["pos_embed"] - table).abs().max() > 1e-5
    if form == "started from an average":
        tree["model"]["module.pos_embed"] = tree["ema"]["pos_embed"]
        tree["ema"]["pos_embed"] = averaged(tree["ema"]["pos_embed"], steps)
    given = {"ema alone": {"ema": tree["ema"]}, "bare ema": tree["ema"], "model alone": {"model": tree["model"]}}
    torch.save(given.get(form, tree), tmp_path / "0006000.pt")
    notes = [note for note in read_lightningdit(tmp_path / "0006000.pt").notes if "position table" in note]
    assert len(notes) == (form != "model alone")
    if notes and form != "started from an average":
        assert f"is off by {off}" in notes[0]
    convert(tmp_path / "0006000.pt", "native", tmp_path / "native")
    convert(tmp_path / "native", "lightningdit", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for part in ("model", "ema"):
        torch.testing.assert_close(back[part]["pos_embed"], table, rtol=0, atol=1e-6)
        weights = tree["ema" if form in ("ema alone", "bare ema") else "model" if form == "model alone" else part]
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
        assert all(torch.equal(back[part][n], tensor) for n, tensor in weights.items() if n not in POSITIONS)


@pytest.mark.parametrize("change", [
    lambda s: s["pos_embed"].mul_(0.998), lambda s: s["pos_embed"].add_(1e-3),
    lambda s: s["pos_embed"][0, 0, 0].add_(1),
    lambda s: s.update(pos_embed=s["pos_embed"].flip(1)), lambda s: s["pos_embed"][0, 1, 2].fill_(torch.nan),
    lambda s: s["feat_rope.freqs_cos"].mul_(0.9999), lambda s: s.update(pos_embed=s["pos_embed"].transpose(1, 2)),
    lambda s: s.update(pos_embed=s["pos_embed"][:, :9]),
])
def test_other_position_tables_are_refused(tree, change, tmp_path):
    change(tree["ema"])
    torch.save(tree, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"\(ema\) (pos_embed|feat_rope.freqs_cos) (is not the fixed|has shape)"):
        read_lightningdit(tmp_path / "bad.pt")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.char(), "is of torch.int8"), (lambda t: t > 0, "is of torch.bool"),
    (lambda t: t.to(torch.float8_e5m2), "is of torch.float8_e5m2"),
    (lambda t: t.to(torch.complex64), "is of torch.complex64"),
    (lambda t: torch.zeros(1).expand(t.shape), "more numbers than are in the file"),
    (lambda t: torch.zeros(1).expand(1 << 40), "more numbers than are in the file"),
    (lambda t: t.to("meta"), "no plain tensor .it is on the device meta"),
    (lambda t: t.to_sparse(), "no plain tensor .it is sparse_coo"),
])
def test_tensors_that_are_no_weights(tree, change, message, tmp_path):
    name = "blocks.1.attn.proj.weight"
    tree["ema"][name] = change(tree["ema"][name])
    torch.save(tree, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        read_lightningdit(tmp_path / "bad.pt")


def test_blocks_that_are_only_claimed(tree, tmp_path):
    """Names are cheap: a module for each would take hours."""
    state = tree["ema"] | {f"blocks.{i}.norm1.weight": torch.zeros(0) for i in range(2, 1001)}
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="has 1001 blocks"):
        read_lightningdit(tmp_path / "bad.safetensors")


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


@pytest.mark.parametrize("mean, message", [
    (torch.zeros(1).expand(1, 1 << 40, 1, 1), "more numbers than are in the file"),
    (torch.zeros(8, device="meta"), "no plain tensor .it is on the device meta"),
    (torch.zeros(8).to_sparse(), "no plain tensor .it is sparse_coo"),
    (torch.zeros(8).to(torch.float8_e4m3fn), "does not hold the floating point tensors"),
    (torch.zeros(8, dtype=torch.int32), "does not hold the floating point tensors"),
    (torch.zeros(1, 8, 2, 2), r"one number per channel, not of shape \(1, 8, 2, 2\)"),
    (torch.full((8,), torch.nan), "one finite mean"),
    (torch.zeros(1 << 40, 0), "one number per channel"),
])
def test_statistics_that_are_none(mean, message, tmp_path):
    torch.save({"mean": mean, "std": torch.ones(8)}, tmp_path / "latents_stats.pt")
    with pytest.raises(UserError, match=f"latents_stats.pt.*{message}"):
        LatentStatistics.read(tmp_path / "latents_stats.pt")


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
