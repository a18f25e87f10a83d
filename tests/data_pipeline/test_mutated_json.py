"""Thousands of damaged and forged JSON files: each is refused in one line, or means what it says."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from dit_oracle import stored
from json_mutations import damaged, edited, one_line, put
from latent_folder import artifact, random_latents
from tar_builder import sample, write_tar
from vtp_oracle import DATA

from megavtp.checkpoint.formats import hf_vtp
from megavtp.checkpoint.formats.hf_vtp_config import OfficialConfig, config_to_official
from megavtp.config.load import read_yaml
from megavtp.data.decode import BadSample
from megavtp.data.index import build_index
from megavtp.data.shards import open_dataset
from megavtp.dit import lightningdit
from megavtp.dit.lightningdit import read_lightningdit
from megavtp.errors import UserError
from megavtp.extraction.folder import SETTINGS_FILE, UnfinishedLatents
from megavtp.extraction.moments import Moments, channel_moments
from megavtp.latents.artifact import FILE, TokenizerArtifact
from megavtp.latents.folder import LatentFolder
from megavtp.training.metrics_file import MetricsFile, read_metrics

COUNT = 1000


def fuzz(text: bytes, reader, seed: int = 0, damages: float = 0.2) -> int:
    """How many of ``COUNT`` mutations ``reader`` accepts; it must refuse the others with one line."""
    draw, accepted = random.Random(seed), 0
    for number in range(COUNT):
        data = (damaged if draw.random() < damages else edited)(text, draw)
        try:
            reader(data)
            accepted += 1
        except UserError as error:
            assert one_line(error), number
        except Exception as error:
            error.add_note(f"mutation {number}: {data[:3000]!r}")
            raise
    return accepted


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name, keys in (("a.tar", "klm"), ("b.tar", "no")):
        members = [m for key in keys for m in sample(key, f"caption of {key}", meta=b'{"label": "%s"}' % key.encode())]
        write_tar(folder / name, members)
    build_index(folder)
    return folder


def read_all(folder: Path) -> list:
    data = open_dataset(folder)
    assert len(data) <= 5
    found = []
    for shard, count in enumerate(data.shard_counts):
        for row in range(count):
            try:
                found.append(data.read(shard, row))
                assert isinstance(data.name(shard, row), str) and found[-1].image
            except BadSample:
                found.append(None)
    return found


def test_mutated_index(shards):
    path = shards / "index.json"
    whole, honest = path.read_bytes(), {sample.id: sample for sample in read_all(shards)}

    def read(data):
        put(path, data)
        assert all(honest[sample.id] == sample for sample in read_all(shards))

    assert 20 < fuzz(whole, read) < 600
    put(path, whole)


def test_mutated_sidecars(shards):
    path = shards / "a.tar.index.json"
    whole, tar = path.read_bytes(), (shards / "a.tar").read_bytes()

    def read(data):
        put(path, data)
        samples, side = read_all(shards), json.loads(data)
        for row, found in enumerate(samples[:3]):
            if found is not None:
                start, size = side["image_offset"][row], side["image_size"][row]
                assert found.key == side["keys"][row] and found.image == tar[start : start + size]

    assert 20 < fuzz(whole, read) < 600
    put(path, whole)


@pytest.mark.parametrize("change, message", [
    (lambda i: i["shards"][0].update(samples=10**12), "index.json is damaged"),
    (lambda i: (i["shards"][0].update(samples=10**12), i.update(total=10**12 + 2)), "too small for 1000000000000 sam"),
    (lambda i: i["shards"][0].update(bytes=10**15), "has changed since it was indexed"),
    (lambda i: (i["shards"].append(i["shards"][0]), i.update(total=8)), "index.json is damaged"),
    (lambda i: i["shards"][0].update(file="../a.tar"), "is missing or has changed"),
    (lambda i: i["shards"][0].update(file="a\0.tar"), "is missing or has changed"),
    (lambda i: i.update(version=2), "has format version 2, this MegaVTP reads 1"),
    (lambda i: i.update(more=1), "more: Unexpected keyword argument"),
])
def test_an_index_that_claims_other_things_than_the_tars(shards, tmp_path, change, message):
    folder = shutil.copytree(shards, tmp_path / "copy")
    index = json.loads((folder / "index.json").read_bytes())
    change(index)
    put(folder / "index.json", json.dumps(index))
    with pytest.raises(UserError, match=message) as error:
        open_dataset(folder)
    assert "prepare_data.py index" in str(error.value)


def test_mutated_config_of_a_released_model(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DATA / "default" / name, tmp_path / name)
    path = tmp_path / "config.json"
    whole, tensors, seen = path.read_bytes(), hf_vtp.load_tensors(tmp_path), {}
    monkeypatch.setattr(hf_vtp, "load_tensors", lambda folder: tensors)
    changed_by_reading = ("text_pad_id", "text_output_tokens", "nonscalar_logit_scale")

    def read(data):
        put(path, data)
        config, state = hf_vtp.load_folder(tmp_path)
        told = {**asdict(OfficialConfig()), **json.loads(data, parse_int=float)}
        again = config_to_official(config)
        for key in asdict(OfficialConfig()).keys() - set(changed_by_reading):
            assert again[key] == told[key] or (not told[key] and again[key] is None), key
        assert len(state) == len(seen["state"])

    seen["state"] = hf_vtp.load_folder(tmp_path)[1]
    assert 20 < fuzz(whole, read) < 700


@pytest.mark.parametrize("key, text", [
    ("vision_depth", "1000000000"), ("vision_embed_dim", "1" + "0" * 18), ("vision_mlp_ratio", "NaN"),
    ("vision_mlp_ratio", "1e308"), ("image_size", "96000"), ("text_vocab_size", "1000000000000"),
    ("text_context_length", "1000000000"), ("decoder_num_heads", "1000000"), ("vision_feature_bottleneck", "10000000"),
])
def test_a_released_model_of_absurd_sizes_takes_no_memory(tmp_path, key, text):
    data = {**json.loads((DATA / "default/config.json").read_bytes()), key: "<value>"}
    (tmp_path / "config.json").write_text(json.dumps(data).replace('"<value>"', text))
    with pytest.raises(UserError, match="config.json.*" + key.rpartition("_")[2][:4]):
        hf_vtp.load_folder(tmp_path)  # the weights are not even there


def test_mutated_tokenizer_facts(tmp_path):
    artifact(4).write(tmp_path)
    path = tmp_path / FILE

    def read(data):
        put(path, data)
        found = json.dumps(TokenizerArtifact.read(tmp_path).to_dict())
        assert json.loads(found, parse_int=float) == json.loads(data, parse_int=float)

    assert 20 < fuzz(path.read_bytes(), read) < 700


def test_mutated_facts_and_classes_of_latents(tmp_path):
    folder = random_latents(tmp_path / "latents", counts=(3, 2))
    classes, facts = folder / "classes.json", folder / FILE
    classes.write_text(json.dumps(["cat", "dog", "fish", "owl", "bär"]))
    whole = classes.read_bytes()

    def read_classes(data):
        put(classes, data)
        found = LatentFolder(folder)
        assert found.classes == json.loads(data) and found.read(1, 1, False).label < found.num_classes

    def read_facts(data):
        put(facts, data)
        found = LatentFolder(folder)
        latents = found.statistics.normalise(found.read(0, 0, True).latents)
        assert latents.shape == (4, 4, 4)

    assert 20 < fuzz(whole, read_classes) < 700
    put(classes, whole)
    assert 20 < fuzz(facts.read_bytes(), read_facts) < 700


def test_mutated_settings_and_sums_of_an_extraction(tmp_path):
    folder = UnfinishedLatents(tmp_path / "latents", artifact(4), {"batch": 3, "label": None}, 1)
    folder.claim()
    path = folder.folder / SETTINGS_FILE

    def claim(data):
        put(path, data)
        folder.claim()
        told = {name: value for name, value in json.loads(data).items() if value is not None}
        assert told == {name: value for name, value in folder.settings.items() if value is not None}

    assert fuzz(path.read_bytes(), claim) < 300
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    sums = Moments.of(tuple(latents.shape), channel_moments(latents))

    def load(data):
        found = Moments.load(data.decode(errors="replace"), 4, "the shard")
        found.joined(sums).statistics()

    fuzz(sums.dump().encode(), load)


def test_mutated_config_of_a_lightningdit(tmp_path, monkeypatch):
    state = stored("state")
    told = {
        "model": {"depth": 2, "num_heads": 2, "in_chans": 8, "model_type": "LightningDiT-B/2", "use_qknorm": False},
        "data": {"num_classes": 10},
    }
    tree = {"ema": state}
    monkeypatch.setattr(lightningdit, "read_weights_file", lambda *_: tree)
    monkeypatch.setattr(lightningdit, "dit_shapes", cache(lightningdit.dit_shapes))

    def read(data):
        try:
            tree["config"] = json.loads(data)
        except (ValueError, RecursionError):
            tree["config"] = None
        found = read_lightningdit(tmp_path / "7.pt")
        model = found.config.model
        assert (model.depth, model.width, found.step) == (2, state["pos_embed"].shape[2], 7)

    del told["model"]["model_type"]
    assert fuzz(json.dumps(told).encode(), read) > 100
    told["model"]["model_type"] = "LightningDiT-B/" + "2" * 5000
    read(json.dumps(told).encode())  # no name of a size


def test_mutated_metrics(tmp_path):
    lines = [json.dumps({"kind": "step", "step": step, "loss": 0.5, "terms": {"a": [1]}}) for step in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))

    def read(data):
        put(path, b"\n".join((lines[0].encode(), data, lines[2].encode())))
        MetricsFile(path, 3).close()
        steps = [record["step"] for record in read_metrics(path)]
        assert steps[0] == 1 and steps[-1] <= 3

    fuzz(lines[1].encode(), read)


@pytest.mark.parametrize("name, text", [
    ("x.json", "[" * 100_000), ("x.json", '{"a": ' + "1" * 5000 + "}"), ("x.yaml", "a: " + "1" * 5000),
    ("x.yaml", "a: 2001-99-99"), ("x.yaml", "[" * 1000),
])
def test_settings_that_the_parsers_choke_on(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read_yaml(tmp_path / name)
