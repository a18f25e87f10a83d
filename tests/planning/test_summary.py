import re

import pytest
import torch

from megavtp.config.load import load_config
from megavtp.config.schema import DEMO_CONFIG, Config, ModelConfig
from megavtp.config.validate import validate
from megavtp.models.vtp import VTP
from megavtp.planning.summary import layout_summary, parameter_counts, state_bytes


@pytest.mark.parametrize(("size", "vision", "decoder", "total"), [
    ("s", 21_611_520, 21_621_120, 167_177_857),
    ("b", 85_690_368, 85_708_800, 295_639_297),
    ("l", 303_542_528, 303_591_424, 731_570_689),
])
def test_counts_are_those_of_the_released_models(size, vision, decoder, total):
    counts = parameter_counts(validate(Config(model=ModelConfig(size=size)), None))
    assert (counts["vision"], counts["decoder"]) == (vision, decoder)
    assert counts["vision"] + counts["text"] + counts["decoder"] == total


@pytest.mark.parametrize("overrides", [
    (),
    ("model.vision.qk_norm=true", "model.decoder.ffn=mlp", "model.decoder.norm=rmsnorm", "model.vision.norm=layernorm"),
    ("model.vision.layer_scale=1e-5", "model.text.layer_scale=0.1", "model.init_logit_bias=-10"),
    ("model.bottleneck_reconstruction_only=false", "model.text.projection=none", "model.dino_head.layers=2"),
    ("objectives.contrastive.weight=0", "objectives.reconstruction.weight=0"),
])
def test_counts_are_the_models(overrides):
    config = validate(load_config(DEMO_CONFIG, Config, ["model.text.vocab_size=512", *overrides]), 1)
    on = {n for n in ("contrastive", "self_distillation", "reconstruction") if getattr(config.objectives, n).weight}
    with torch.device("meta"):
        model = VTP(config.model, objectives=on)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = parameter_counts(config)
    teacher = counts.pop("teacher")
    assert trained == sum(counts.values())
    assert sum(p.numel() for p in model.teacher.parameters()) == teacher


def test_a_frozen_encoder_is_weights_alone():
    overrides = [
        "model.text.vocab_size=512", "objectives.contrastive.weight=0", "objectives.self_distillation.weight=0",
        "model.init_from=x", "parallel.zero_stage=0",
    ]
    joint = validate(load_config(DEMO_CONFIG, Config, overrides), 1)
    overrides = [*overrides, "objectives.reconstruction.frozen_encoder=true"]
    frozen = validate(load_config(DEMO_CONFIG, Config, overrides), 1)
    with torch.device("meta"):
        model = VTP(frozen.model, objectives={"reconstruction"}, frozen_encoder=True)
    parameters = list(model.parameters())
    trained, still = (sum(p.numel() for p in parameters if p.requires_grad == wanted) for wanted in (True, False))
    assert parameter_counts(frozen) == {"frozen_encoder": still, "decoder": trained}
    assert state_bytes(frozen, 1) == 16 * trained + 4 * still
    assert state_bytes(joint, 1) == 16 * (trained + still)


def test_state_shrinks_with_the_layout():
    def at(stage, dp):
        overrides = [f"parallel.zero_stage={stage}", "model.text.vocab_size=512"]
        return state_bytes(validate(load_config(DEMO_CONFIG, Config, overrides), 1), dp)

    assert at(0, 4) > at(1, 4) > at(2, 4) > at(3, 4)
    assert at(3, 4) == pytest.approx(at(3, 1) / 4, rel=1e-6)


def test_the_page_says_what_would_run():
    config = validate(load_config(DEMO_CONFIG, Config, ["objectives.contrastive.micro_batch=4"]), 2)
    page = layout_summary(config, 2)
    assert re.search(r"2 processes = tp 1 x pp 1 x dp 2", page)
    share = config.train.batch_size // 2
    assert f"{share} on a rank in {share // 4} micro-batches of 4" in page
    assert all(len(line) < 160 for line in page.splitlines())
