"""Runs of the second stage with its discriminator resume bit for bit, and their averaged decoder goes into the
tokenizer."""

from __future__ import annotations

import pytest
import torch
from launched import events, run, succeed

import megavtp
from megavtp.checkpoint.formats.vtp_source import open_vtp
from megavtp.checkpoint.reading import open_checkpoint
from megavtp.conversion import convert
from megavtp.decoder.launcher import train_decoder

pytestmark = pytest.mark.timeout(600)
ADVERSARIAL = [
    "objectives.contrastive.weight=0", "objectives.self_distillation.weight=0", "train.checkpoint_every=0",
    "objectives.reconstruction.decoder_momentum=0.5", "objectives.adversarial.weight=0.5",
    "objectives.adversarial.discriminator_start=0.25", "objectives.adversarial.start=0.5",
]


@pytest.fixture(scope="module")
def pretrained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    succeed(["--config", recipe, f"output_dir={folder}/run", "train.steps=2"], 1, folder)
    return folder / "run"


def train(recipe, pretrained, output, world, *more):
    arguments = ["--config", recipe, f"output_dir={output}", f"model.init_from={pretrained}/checkpoints/latest"]
    succeed([*arguments, *ADVERSARIAL, *more], world, output.parent, entry=train_decoder)


def state(output):
    with open_checkpoint(output / "checkpoints" / "latest") as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names}


def test_resumed_runs_end_as_the_uninterrupted_one(recipe, pretrained, tmp_path):
    eight = "train.steps=8"
    train(recipe, pretrained, tmp_path / "whole", 1, eight)
    whole = state(tmp_path / "whole")
    directions = [name for name in whole if name.startswith("direction/")]
    assert directions and any(name.startswith("exp_avg/discriminator.") for name in whole)
    # Stopped before the discriminator starts, while it learns alone, and when both learn.
    train(recipe, pretrained, tmp_path / "again", 1, eight, "train.checkpoint_every=1", "train.keep_last=9")
    for step in (1, 3, 6):
        output = tmp_path / f"from{step}"
        (output / "checkpoints").mkdir(parents=True)
        name = f"step-{step:08d}"
        (tmp_path / "again" / "checkpoints" / name).rename(output / "checkpoints" / name)
        train(recipe, pretrained, output, 1, eight)
        assert [event["step"] for event in events(output, "resumed")] == [step]
        found = state(output)
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_until_it_starts_the_run_is_that_without_a_discriminator(recipe, pretrained, tmp_path):
    late = [f"objectives.adversarial.{name}=0.9" for name in ("discriminator_start", "start")]
    train(recipe, pretrained, tmp_path / "late", 1, "train.steps=3", *late)
    train(recipe, pretrained, tmp_path / "without", 1, "train.steps=3", "objectives.adversarial.weight=0")
    late, without = state(tmp_path / "late"), state(tmp_path / "without")
    assert any(name.startswith("exp_avg/pixel_decoder.") for name in without)
    assert all(torch.equal(late[name], tensor) for name, tensor in without.items())


def test_the_average_goes_into_the_tokenizer(recipe, pretrained, tmp_path):
    train(recipe, pretrained, tmp_path / "second", 1, "train.steps=4")
    source = open_vtp(tmp_path / "second" / "checkpoints" / "latest")
    own, averaged = (
        {name.removeprefix(tower): t for name, t in source.tensors.items() if name.startswith(tower)}
        for tower in ("pixel_decoder.", "averaged_decoder.")
    )
    assert own.keys() == averaged.keys() and any(not torch.equal(own[name], averaged[name]) for name in own)
    first = pretrained / "checkpoints" / "latest"
    convert(first, "native", tmp_path / "mixed", decoder=tmp_path / "second" / "checkpoints" / "latest")
    mixed = open_vtp(tmp_path / "mixed").tensors
    assert all(torch.equal(mixed[f"pixel_decoder.{name}"], tensor) for name, tensor in averaged.items())
    latents = torch.randn(2, *megavtp.load_tokenizer(first).encode(torch.rand(2, 3, 32, 32)).shape[1:])
    decoded = [megavtp.load_tokenizer(path).decode(latents) for path in (tmp_path / "mixed", source.path)]
    assert torch.equal(*decoded)


def test_bad_features(recipe, pretrained, tmp_path):
    (tmp_path / "file.pth").write_bytes(b"nothing")
    arguments = ["--config", recipe, f"output_dir={tmp_path}/run", f"model.init_from={pretrained}/checkpoints/latest"]
    features = [
        "objectives.adversarial.features=timm:vit_small_patch8_224",
        f"objectives.adversarial.features_weights={tmp_path}/file.pth",
    ]
    ranks = run([*arguments, *ADVERSARIAL, *features], 1, tmp_path, entry=train_decoder)
    assert ranks.processes[0].exitcode == 2 and len(ranks.errors) == 1, ranks.output
    assert "needs the timm library" in ranks.errors[0] or "file.pth" in ranks.errors[0]
