"""The settings of a DiT's run: recipes, rules between keys, sizes that the latents decide, the dry run's page."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavtp.config.load import from_dict, load_config, to_dict
from megavtp.config.share import PassShare
from megavtp.dit.config import SIZES, DiTConfig, DiTModelConfig, resolve_dit
from megavtp.dit.model.build import build_dit
from megavtp.dit.model.model import DiT
from megavtp.dit.summary import dit_flops, dit_parameters, dit_summary
from megavtp.dit.validate import flow_share, validate_dit, with_latents
from megavtp.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "configs").rglob("dit_*.yaml"))
BASE = """
model: {size: tiny}
data: {streams: 8}
train: {steps: 10, batch_size: 32, optimizer: {warmup_steps: 0}}
"""
LATENTS = SimpleNamespace(shape=(64, 16, 16), num_classes=1000, caption_width=None, has_flips=True)


@pytest.fixture
def check(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return lambda world, *overrides: validate_dit(load_config(path, DiTConfig, overrides), world)


def test_there_is_a_recipe_for_the_published_models():
    assert {path.stem for path in RECIPES} >= {"dit_b", "dit_l", "dit_xl", "dit_1p0b", "dit_1p6b", "dit_emoji"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(recipe):
    for world in (1, 2, 4):
        config = validate_dit(load_config(recipe, DiTConfig), world)
    assert validate_dit(from_dict(to_dict(config), DiTConfig), world) == config
    header = recipe.read_text().split("seed:")[0]
    for line in ("expected result", "FLOPs", "memory", "hours", "hardware"):
        assert f"# {line}" in header
    if recipe.parent.name == "dit":
        optimizer, flow = config.train.optimizer, config.flow_matching
        assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay, optimizer.betas) == (2e-4, 2e-4, 0, (0.9, 0.95))
        assert (config.ema_momentum, flow.condition_dropout, config.train.batch_size) == (0.9999, 0.1, 1024)
        stated = float(header.split("FLOPs")[1].split()[0])
        assert 3e-12 * dit_flops(with_latents(config, LATENTS).model) == pytest.approx(stated, rel=0.05)


ERRORS = {
    ("model.latent_size=96000",): "model.latent_size = 96000: must be between 1 and 512",
    ("model.depth=1000000000",): "model.depth = 1000000000: must be between 1 and 256",
    ("model.num_classes=1000000000000",): "model.num_classes = .*: must be between 1 and 16777216",
    ("model.heads=5",): r"model.width = 192 is not a multiple of model.heads = 5",
    ("model.heads=96",): "heads of 2 channels: the rotary",
    ("model.patch_size=3", "model.latent_size=8"): "model.latent_size = 8 is not a multiple of model.patch_size = 3",
    ("parallel.tp=2", "model.heads=3"): "model.heads = 3 is not a multiple of parallel.tp = 2",
    ("model.condition=caption", "model.num_classes=3"): "num_classes = 3 is given, but model.condition = caption",
    ("model.caption_width=3",): "caption_width = 3 is given, but model.condition = class",
    ("flow_matching.time_sigma=0",): "time_sigma = 0.0: must be above 0",
    ("flow_matching.condition_dropout=1.0",): "condition_dropout = 1: must be below 1",
    ("flow_matching.micro_batch=5",): "micro_batch = 5",
    ("data.streams=5",): "train.batch_size = 32 is not a multiple of data.streams = 5",
    ("parallel.pp=2", "parallel.schedule=interleaved_1f1b"): "needs parallel.virtual_stages of 2 or more",
    ("parallel.schedule=gpipe",): "parallel.pp = 1 has no pipeline",
    ("parallel.pp=2", "model.depth=1"): "model.depth = 1: every stage needs a block of the DiT",
    ("parallel.sequence_parallel=true",): "but parallel.tp = 1: raise parallel.tp",
    ("train.optimizer.lr_scale={vision: 1.0}",): "no such tower; the towers are dit",
    ("ema_momentum=1.5",): "ema_momentum = 1.5: must be between 0 and 1",
    ("model.sise=b",): "did you mean model.size",
    ("objectives.weight=1",): r"unknown key",
}


@pytest.mark.parametrize("overrides", ERRORS, ids=lambda o: " ".join(o))
def test_errors_name_the_keys(check, overrides):
    with pytest.raises(UserError, match=ERRORS[overrides]) as raised:
        check(2, *overrides)
    assert "\n" not in str(raised.value)


def test_shares(check):
    assert flow_share(check(2), 2) == PassShare(32, 16, 16)
    config = check(8, "parallel.tp=1", "flow_matching.micro_batch=2")
    assert flow_share(config, 8).micro_batches == 2
    with pytest.raises(UserError, match="micro_batch = 3"):
        check(4, "flow_matching.micro_batch=3")
    with pytest.raises(UserError, match="data.streams = 8 is not a multiple of .* = 3"):
        check(3)


def test_what_the_latents_decide(check):
    model = with_latents(check(1), LATENTS).model
    assert (model.latent_size, model.latent_channels, model.num_classes, model.caption_width) == (16, 64, 1000, None)
    assert with_latents(check(1, "model.num_classes=1200"), LATENTS).model.num_classes == 1200
    captioned = SimpleNamespace(**{**vars(LATENTS), "caption_width": 32})
    caption = with_latents(check(1, "model.condition=caption"), captioned).model
    assert (caption.num_classes, caption.caption_width) == (None, 32)
    for override, message in {
        "model.latent_size=8": "latent_size = 8, but the latents .* have 16", "model.num_classes=3": "num_classes = 3",
        "model.latent_channels=4": "latent_channels = 4", "model.condition=caption": "have no captions",
        "model.patch_size=5": "latent_size = 16 is not a multiple",
    }.items():
        with pytest.raises(UserError, match=message):
            with_latents(check(1, override), LATENTS)
    unflipped = SimpleNamespace(**{**vars(LATENTS), "has_flips": False})
    with pytest.raises(UserError, match="no latents of mirrored images"):
        with_latents(check(1), unflipped)
    with_latents(check(1, "data.flip=0"), unflipped)


@pytest.mark.parametrize("condition", ["class", "caption"])
@pytest.mark.parametrize("size", SIZES)
def test_counted_parameters_are_those_of_the_model(size, condition):
    more = {"num_classes": 7} if condition == "class" else {"caption_width": 20}
    config = resolve_dit(DiTModelConfig(
        size=size, patch_size=2, latent_size=8, latent_channels=5, condition=condition, qk_norm=True, **more
    ))
    with torch.device("meta"):
        model = DiT(config)
    assert dit_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_flops_are_those_of_torchs_counter():
    for condition in ("class", "caption"):
        more = {"num_classes": 7} if condition == "class" else {"caption_width": 20}
        config = resolve_dit(DiTModelConfig(
            width=48, depth=2, heads=4, patch_size=2, latent_size=8, latent_channels=5, condition=condition, **more
        ))
        model = build_dit(config)
        # The counter knows attention as matrix products, not the CPU's fused kernel.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(3, 5, 8, 8), torch.rand(3), model.no_condition(3))
        assert counter.get_total_flops() == 3 * dit_flops(config)


def test_summary(check):
    config = check(4, "parallel.tp=1", "parallel.zero_stage=2", "flow_matching.micro_batch=4")
    page = dit_summary(config, 4)
    assert "DiT-tiny" in page and "tp 1 x pp 1 x dp 4, ZeRO stage 2" in page
    assert "32 latents, 8 on a rank in 2 micro-batches of 4" in page and "those of data.root" in page
    assert dit_flops(with_latents(config, LATENTS).model) > 0
