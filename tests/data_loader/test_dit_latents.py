"""The reader of latents, against LightningDiT's, and the batches of a DiT's training."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from dit_oracle import DATA, stored
from latent_folder import FINGERPRINT, artifact, random_latents, random_shard, write_latents
from safetensors.torch import save_file

from megavtp.config.load import from_dict
from megavtp.data.decode import BadSample
from megavtp.data.loader import Loader
from megavtp.dit.batch import LatentBatch, LatentStepDataset
from megavtp.dit.config import DiTConfig
from megavtp.dit.validate import validate_dit, with_latents
from megavtp.errors import UserError
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact
from megavtp.latents.folder import LatentFolder


def config_for(folder: LatentFolder, world: int = 1, **sections) -> DiTConfig:
    base = {
        "model": {"size": "tiny"}, "data": {"root": str(folder.folder), "streams": 4, "shuffle_block": 4, "workers": 0},
        "train": {"steps": 5, "batch_size": 8, "optimizer": {"warmup_steps": 0}},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return with_latents(validate_dit(from_dict(base, DiTConfig), world), folder)


@pytest.fixture
def folder(tmp_path) -> LatentFolder:
    return LatentFolder(random_latents(tmp_path / "latents", mean=0.5, std=2.0))


def test_items_of_the_official_reader(tmp_path):
    shutil.copytree(DATA / "dataset", tmp_path / "set")
    statistics = LatentStatistics.read(tmp_path / "set" / "latents_stats.pt")
    replace(artifact(8), statistics=statistics).write(tmp_path / "set")
    folder, expected = LatentFolder(tmp_path / "set"), stored("items")
    assert folder.shard_counts == [7, 3, 6] and folder.shape == (8, 4, 4) and folder.has_flips
    np.random.seed(4)  # the official class draws one number for each item it gives
    rows = [(shard, row) for shard, count in enumerate(folder.shard_counts) for row in range(count)]
    samples = [folder.read(shard, row, flip=not np.random.uniform() > 0.5) for shard, row in rows]
    latents = folder.statistics.normalise(torch.stack([sample.latents for sample in samples]))
    torch.testing.assert_close(latents, expected["features"], rtol=1e-6, atol=1e-6)
    assert [sample.label for sample in samples] == expected["labels"].tolist()


def test_a_step_is_a_function_of_seed_and_step(folder):
    config = config_for(folder)
    whole = [LatentStepDataset(folder, config)[step] for step in (0, 3)]
    again = LatentStepDataset(LatentFolder(folder.folder), config)[3]
    for dp in (2, 4):
        shares = [LatentStepDataset(folder, config, rank, dp)[3] for rank in range(dp)]
        for name in ("positions", "latents", "noise", "times", "conditions"):
            joined = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(joined, getattr(whole[1], name)) and torch.equal(joined, getattr(again, name)), name
        assert sum((share.ids for share in shares), []) == whole[1].ids
    other = LatentStepDataset(folder, replace(config, seed=1))[3]
    for different in (whole[0], other):
        assert not torch.equal(different.noise, whole[1].noise) and different.ids != whole[1].ids
        assert not torch.equal(different.times, whole[1].times)


def test_every_sample_comes_once_an_epoch_and_normalised(folder):
    dataset = LatentStepDataset(folder, config_for(folder))
    batches = [dataset[step] for step in range(3)]
    assert len(set(sum((batch.ids for batch in batches), []))) == 24
    batch = batches[0]
    match = re.fullmatch(r"latents_rank00_shard(\d+).safetensors/(\d+)", batch.ids[2])
    shard, row = map(int, match.groups())
    stored_both = [folder.read(shard, row, flip).latents for flip in (False, True)]
    assert any(torch.allclose(batch.latents[2], (x - 0.5) / 2.0, atol=1e-6) for x in stored_both)
    assert batch.latents.dtype == batch.noise.dtype == batch.times.dtype == torch.float32


def draws(folder, steps: int, **sections) -> list[LatentBatch]:
    dataset = LatentStepDataset(folder, config_for(folder, **sections))
    return [dataset[step] for step in range(steps)]


def test_distribution_of_times_noise_flips_and_dropped_labels(folder):
    batches = draws(folder, 400, flow_matching={"time_mu": -0.5, "time_sigma": 1.25, "condition_dropout": 0.25})
    times = torch.cat([batch.times for batch in batches]).sort().values
    official = stored("transport")["times_-0.5_1.25"].sort().values
    quantiles = torch.linspace(0.05, 0.95, 19)
    # 3,200 against 20,000 draws: three standard errors of an empirical distribution function are below 0.03
    inverse = torch.searchsorted(official, times.quantile(quantiles)) / len(official)
    assert (inverse - quantiles).abs().max() < 0.03
    noise = torch.cat([batch.noise for batch in batches])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    labels = torch.cat([batch.conditions for batch in batches])
    assert labels.max() == folder.num_classes == 3
    assert (labels == 3).float().mean().item() == pytest.approx(0.25, abs=0.03)
    plain = draws(folder, 3, data={"flip": 0.0}, flow_matching={"condition_dropout": 0.0})
    flipped = draws(folder, 3, data={"flip": 1.0}, flow_matching={"condition_dropout": 0.0})
    for a, b in zip(plain, flipped):
        assert a.ids == b.ids and torch.equal(a.noise, b.noise) and not torch.equal(a.latents, b.latents)
        assert (a.conditions < 3).all()


def test_captions(tmp_path):
    folder = LatentFolder(random_latents(tmp_path / "latents", captions=6))
    (batch,) = draws(folder, 1, model={"condition": "caption"}, flow_matching={"condition_dropout": 0.5})
    norms = batch.conditions.norm(dim=-1)
    assert batch.conditions.shape == (8, 6) and set(norms.round().tolist()) == {0.0, 1.0}
    plain = LatentFolder(random_latents(tmp_path / "plain"))
    with pytest.raises(UserError, match="model.condition = caption.*no captions"):
        config_for(plain, model={"condition": "caption"})


def test_broken_samples_are_replaced_counted_and_bounded(tmp_path):
    shards = [random_shard(14, (4, 4, 4), 0), random_shard(10, (4, 4, 4), 1)]
    shards[1]["latents"][3, 0, 0, 0] = float("nan")
    shards[1]["latents_flip"][3, 1, 0, 0] = float("inf")
    folder = LatentFolder(write_latents(tmp_path / "latents", shards))
    with pytest.raises(BadSample, match="not finite"):
        folder.read(1, 3, False)
    batches = draws(folder, 3)
    bad = sum((batch.bad for batch in batches), [])
    assert bad == ["latents_rank00_shard001.safetensors/3: a number in it is not finite"]
    assert all(batch.latents.isfinite().all() for batch in batches)
    loader = Loader(LatentStepDataset(folder, config_for(folder)), 0, 3, max_bad_samples=0)
    with pytest.raises(UserError, match="1 bad samples"):
        list(loader)


def test_worker_processes_give_the_same(folder):
    dataset = LatentStepDataset(folder, config_for(folder))
    with Loader(dataset, 1, 4, workers=2) as loader:
        batches = list(loader)
    assert [batch.step for batch in batches] == [1, 2, 3]
    assert all(torch.equal(batch.noise, dataset[batch.step].noise) for batch in batches)


def test_class_names_and_shards_of_another_tokenizer(tmp_path):
    path = random_latents(tmp_path / "latents")
    (path / "classes.json").write_text(json.dumps(["cat", "dog", "fish", "owl"]))
    folder = LatentFolder(path)
    assert folder.num_classes == 4 and folder.classes == ["cat", "dog", "fish", "owl"]
    (path / "classes.json").write_text(json.dumps(["cat", "dog"]))
    with pytest.raises(UserError, match="a label is 2, but classes.json names 2 classes"):
        LatentFolder(path)
    shards = [random_shard(4, (4, 4, 4), seed) for seed in range(2)]
    write_latents(tmp_path / "own", shards, {"tokenizer": FINGERPRINT})
    LatentFolder(tmp_path / "own")
    write_latents(tmp_path / "mixed", shards, {"tokenizer": "cd" * 32})
    with pytest.raises(UserError, match="was made by the tokenizer cdcd.*is of abab"):
        LatentFolder(tmp_path / "mixed")


def drop_statistics(path):
    replace(TokenizerArtifact.read(path), statistics=None).write(path)


def write_shard(path, change):
    shard = random_shard(3, (4, 4, 4), 5)
    change(shard)
    write_latents(path / "other", [shard])
    shutil.copy(path / "other" / "latents_rank00_shard000.safetensors", path / "latents_rank00_shard009.safetensors")


def of_nothing(path):
    """The first shard claims many images, of no positions."""
    shard = {"latents": torch.zeros(1 << 40, 4, 0, 0), "labels": torch.zeros(3).long()}
    save_file(shard, path / "latents_rank00_shard000.safetensors")


FAULTS = {
    "no such folder": lambda path: shutil.rmtree(path),
    "visual_tokenizer.json is missing": lambda path: (path / "visual_tokenizer.json").unlink(),
    "no latent statistics": drop_statistics,
    r"holds no \*.safetensors": lambda path: [file.unlink() for file in path.glob("*.safetensors")],
    "the latents have 4 channels, their statistics 5": lambda path: artifact(5).write(path),
    "no tensor labels": lambda path: write_shard(path, lambda shard: shard.pop("labels")),
    "not those of the first shard": lambda path: write_shard(path, lambda shard: shard.pop("latents_flip")),
    "labels must be integers": lambda path: write_shard(path, lambda shard: shard.update(labels=torch.ones(3))),
    "below 1000000": lambda path: write_shard(path, lambda shard: shard.update(labels=torch.tensor([0, 1, 1 << 33]))),
    "labels must be integers from": lambda path: write_shard(path, lambda s: s.update(labels=torch.ones(3).bool())),
    "latents is of I8": lambda path: write_shard(path, lambda shard: shard.update(latents=shard["latents"].char())),
    "no square latents": lambda path: write_shard(path, lambda shard: shard.update(labels=torch.zeros(4).long())),
    "no square latents of": of_nothing,
    "cannot be read": lambda path: (path / "latents_rank00_shard001.safetensors").write_bytes(b"not a shard"),
    "classes.json is damaged or of another kind": lambda path: (path / "classes.json").write_text('{"cat": 0}'),
}


@pytest.mark.parametrize("message", FAULTS)
def test_folders_that_cannot_be_used(message, tmp_path):
    path = random_latents(tmp_path / "latents")
    FAULTS[message](path)
    with pytest.raises(UserError, match=message) as raised:
        LatentFolder(path)
    assert "\n" not in str(raised.value)
