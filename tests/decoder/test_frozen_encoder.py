"""The decoder trained on by itself: only it moves, as plain torch would move it, on every layout; and it goes back into
the tokenizer that it came from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from distributed import run_ranks
from launched import events, run, steps_done, succeed
from layouts import Cell, run_cells, verdict
from tiny_run import PlainRunner, build_model, data_of, optimizer_of, passes_of, tiny_config
from vtp_oracle import TINY

import megavtp
from megavtp.checkpoint.formats.convert import write_native
from megavtp.checkpoint.formats.vtp_source import open_vtp
from megavtp.checkpoint.reading import open_checkpoint
from megavtp.config.load import load_config
from megavtp.config.schema import DEMO_CONFIG, Config, DataConfig, ObjectivesConfig, ReconstructionConfig
from megavtp.conversion import convert
from megavtp.decoder.launcher import train_decoder
from megavtp.decoder.recipe import DecoderTraining
from megavtp.decoder.validate import validate_decoder
from megavtp.errors import UserError
from megavtp.models.build import build_vtp
from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import execute
from megavtp.pixels import normalise
from megavtp.planning.flops import flops_per_step
from megavtp.pretraining.recipe import Pretraining

FROZEN = {
    "model": {"init_from": "not read here"},
    "objectives": {
        "contrastive": {"weight": 0.0}, "self_distillation": {"weight": 0.0},
        "reconstruction": {"frozen_encoder": True},
    },
}
LAYOUTS = [
    Cell(zero=3, micro_batches=2), Cell(tp=2, zero=1), Cell(dp=2, zero=2, micro_batches=2), Cell(dp=2, zero=3),
    Cell(pp=2, zero=1, micro_batches=2), Cell(pp=2, dp=2, zero=3, micro_batches=2, schedule="gpipe"),
    Cell(tp=2, pp=2, zero=0, micro_batches=4), Cell(tp=2, dp=2, zero=3, recompute="full", sequence_parallel=True),
    Cell(pp=2, zero=2, micro_batches=2, precision="bf16"),
    Cell(pp=2, zero=1, micro_batches=2, schedule="interleaved_1f1b"),
]
DEEPER = {**FROZEN, "model": {**FROZEN["model"], "decoder": {"depth": 4}}}  # interleaved: four stages
LAUNCHED = [
    "model.init_from={}/checkpoints/latest", "objectives.contrastive.weight=0", "objectives.self_distillation.weight=0",
    "train.checkpoint_every=0",
]


def check(cells, world, extra):
    results = run_ranks(world, run_cells, cells, extra, timeout=500)[0]
    rows = [verdict(cell, outcome, extra) for cell, (outcome, _) in zip(cells, results, strict=True)]
    assert rows and all(good for _, good in rows), "\n".join(row for row, _ in rows)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_layouts(world):
    check([cell for cell in LAYOUTS if cell.world == world], world, DEEPER)


@pytest.mark.timeout(600)
def test_latents_as_wide_as_the_encoder():
    """Without a bottleneck they leave the last norm in float32, whatever the compute."""
    wide = {**DEEPER, "model": {**DEEPER["model"], "bottleneck": 32}}
    check([Cell(pp=2, zero=1, precision=precision) for precision in ("fp32", "bf16")], 2, wide)


def test_gradient_is_that_of_the_decoder_alone():
    config = tiny_config({**FROZEN, "objectives": {**FROZEN["objectives"], "reconstruction": {
        "frozen_encoder": True, "latent_noise": 0.0,
    }}})
    model = build_model(config, SINGLE)
    runner = PlainRunner(model, optimizer_of(model, config), 0.0)
    batch, (objective,) = data_of(config, SINGLE)(0), passes_of(config, SINGLE)
    terms = execute(objective, runner, batch)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, _ in model.named_parameters() if name.startswith("pixel_decoder.")}

    model.zero_grad()
    model.requires_grad_(True)
    images = normalise(batch.images[batch.rec_rows])
    plain = reconstruction_terms(model("reconstruction", images=images), images, images_total_local=len(images))
    (plain["l1"] * config.objectives.reconstruction.weight).backward()
    assert torch.equal(terms["reconstruction/l1"], plain["l1"].detach())
    assert model.trunk.norm.weight.grad.any()  # of the joint loss; the frozen one had none
    for name, gradient in found.items():
        assert torch.allclose(gradient, model.get_parameter(name).grad, rtol=1e-5, atol=1e-8), name


def test_a_frozen_encoder_costs_its_forward():
    off = {**FROZEN, "objectives": {**FROZEN["objectives"], "reconstruction": {"frozen_encoder": False}}}
    frozen, joint = (flops_per_step(tiny_config(changes))["reconstruction"] for changes in (FROZEN, off))
    assert joint / 3 < frozen < joint


def test_rules():
    def check(world, *overrides):
        return validate_decoder(load_config(DEMO_CONFIG, Config, overrides), world)

    alone = ["objectives.contrastive.weight=0", "objectives.self_distillation.weight=0"]
    with pytest.raises(UserError, match="trains the pixel decoder alone: set objectives.contrastive.weight=0"):
        check(1)
    with pytest.raises(UserError, match="needs an encoder that has learnt something: .*model.init_from"):
        check(1, *alone)
    alone.append("model.init_from=runs/vtp")
    assert check(1, *alone).objectives.reconstruction.frozen_encoder
    assert check(1, *alone, "objectives.reconstruction.frozen_encoder=true") == check(1, *alone)  # as old files say it
    with pytest.raises(UserError, match="objectives.reconstruction.drop_path = 0.1 drops paths of the encoder"):
        check(1, *alone, "objectives.reconstruction.drop_path=0.1")
    for key, why in (
        ("features=vit", "must be own, pixels, or timm:NAME"), ("features=timm", "must be own, pixels, or timm:NAME"),
        ("features=timm:vit_small_patch8_224", "is the file of a timm ViT's weights: name it"),
        ("features_weights=file", "leave it out with features = own"), ("start=0.2", "is before"),
        ("discriminator_start=2", "discriminator_start = 2.0: must be between 0 and 1"),
        ("features_size=40", "objectives.adversarial.features_size = 40 is not a multiple of model.patch_size"),
        ("features_size=16", "needs at least four patches"),
    ):
        with pytest.raises(UserError, match=why):
            check(1, *alone, "objectives.adversarial.weight=1", f"objectives.adversarial.{key}")
    with pytest.raises(UserError, match="decoder_momentum = 1: must be below 1"):
        check(1, *alone, "objectives.reconstruction.decoder_momentum=1")
    with pytest.raises(UserError, match="features_size is not for features = pixels"):
        adversarial = ("weight=1", "features=pixels", "features_size=32")
        check(1, *alone, *(f"objectives.adversarial.{key}" for key in adversarial))
    check(2, *alone, "parallel.pp=2", "model.decoder.depth=2")
    with pytest.raises(UserError, match="but model.decoder.depth = 1: every stage needs a block of the decoder"):
        check(2, *alone, "parallel.pp=2", "model.decoder.depth=1")


def test_the_demonstration_continues_its_own_model():
    first, second = load_config(DEMO_CONFIG, Config), load_config(DEMO_CONFIG.with_name("decoder_emoji.yaml"), Config)
    assert replace(second.model, init_from=None) == first.model
    assert second.objectives.reconstruction == first.objectives.reconstruction
    assert validate_decoder(second, 2).model.init_from == f"{first.output_dir}/checkpoints/latest"


@pytest.mark.timeout(600)
def _of_stage(frozen):
    """A recipe, as far as ``check`` looks at it."""
    reconstruction = ReconstructionConfig(frozen_encoder=frozen)
    return SimpleNamespace(config=Config(objectives=ObjectivesConfig(reconstruction=reconstruction)))


def test_second_stage(recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    succeed(["--config", recipe, f"output_dir={first}", "train.steps=2", "model.rope_dtype=bfloat16"], 1, tmp_path)
    arguments = [
        "--config", recipe, f"output_dir={second}", "model.rope_dtype=bfloat16",
        *(argument.format(first) for argument in LAUNCHED),
    ]
    succeed([*arguments, "train.steps=3", "parallel.zero_stage=3"], 2, tmp_path, entry=train_decoder)
    assert sorted(steps_done(second)) == [1, 2, 3]
    # Goes on from its own checkpoint, on another layout.
    succeed([*arguments, "train.steps=4", "parallel.tp=2"], 2, tmp_path, entry=train_decoder)
    assert [event["step"] for event in events(second, "resumed")] == [3] and sorted(steps_done(second)) == [1, 2, 3, 4]
    with open_checkpoint(second / "checkpoints/latest") as checkpoint:
        DecoderTraining.check(_of_stage(frozen=True), checkpoint)
        with pytest.raises(UserError, match="is of a run of launchers/train_decoder.py, which this one"):
            Pretraining.check(_of_stage(frozen=False), checkpoint)
    before, after = (open_vtp(folder / "checkpoints/latest").tensors for folder in (first, second))
    for name, tensor in after.items():
        assert name.startswith(("trunk.", "pixel_decoder.")), name
        assert torch.equal(tensor, before[name]) == name.startswith("trunk."), name

    convert(first / "checkpoints/latest", "hf-vtp", tmp_path / "hf", decoder=second / "checkpoints/latest")
    convert(tmp_path / "hf", "native", tmp_path / "native", decoder=first / "checkpoints/latest")
    mixed, back = open_vtp(tmp_path / "hf"), open_vtp(tmp_path / "native").tensors
    assert mixed.artifact.fingerprint == open_vtp(first / "checkpoints/latest").artifact.fingerprint
    for name, tensor in back.items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(mixed.tensors[name], (after if name.startswith("pixel_decoder.") else before)[name]), name
    images = torch.rand(2, 3, 32, 32)
    latents = megavtp.load_tokenizer(first / "checkpoints/latest").encode(images)
    tokenizer = megavtp.load_tokenizer(tmp_path / "hf")
    assert torch.equal(tokenizer.encode(images), latents)
    assert torch.equal(tokenizer.decode(latents), megavtp.load_tokenizer(second / "checkpoints/latest").decode(latents))

    other = tmp_path / "other"
    off = ["objectives.reconstruction.weight=0", "seed=9", "train.steps=1", "model.rope_dtype=bfloat16"]
    succeed(["--config", recipe, f"output_dir={other}", *off], 1, tmp_path)
    with pytest.raises(UserError, match="was trained on another encoder"):
        convert(first / "checkpoints/latest", "hf-vtp", tmp_path / "no", decoder=other / "checkpoints/latest")
    assert not (tmp_path / "no").exists()

    # What a run cannot go on from: an encoder with a bottleneck that nothing trained, and another stage's checkpoint.
    for source, output, why in (
        (other, tmp_path / "new", "does not give trunk.feature_bottleneck.weight"),
        (second, first, "is of a run of launchers/pretrain.py"),
    ):
        arguments = [f"output_dir={output}", *(argument.format(source) for argument in LAUNCHED)]
        ranks = run(["--config", recipe, "model.rope_dtype=bfloat16", *arguments], 1, tmp_path, entry=train_decoder)
        assert ranks.processes[0].exitcode == 2 and len(ranks.errors) == 1 and why in ranks.errors[0], ranks.output


def test_a_decoder_for_a_tokenizer_without_one(tmp_path):
    config = Config(model=replace(TINY, rope_dtype="float32"), data=DataConfig(captions="clip"))
    tensors = {f"model/{name}": p.detach() for name, p in build_vtp(config.model, seed=3).named_parameters()}
    without = {name: t for name, t in tensors.items() if not name.startswith("model/pixel_decoder.")}
    off = replace(config.objectives, reconstruction=replace(config.objectives.reconstruction, weight=0.0))
    write_native(tmp_path / "whole", 5, tensors, config)
    write_native(tmp_path / "without", 5, without, replace(config, objectives=off))
    convert(tmp_path / "without", "native", tmp_path / "again", decoder=tmp_path / "whole")
    again = open_vtp(tmp_path / "again")
    assert {f"model/{name}" for name in again.tensors} == tensors.keys()
    assert again.config.objectives.reconstruction.weight > 0
    with pytest.raises(UserError, match="has no pixel decoder"):
        convert(tmp_path / "whole", "native", tmp_path / "no", decoder=tmp_path / "without")
