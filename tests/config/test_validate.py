from pathlib import Path

import pytest

from megavtp.config.load import load_config
from megavtp.config.run import ParallelConfig
from megavtp.config.schema import Config
from megavtp.config.share import PassShare, share
from megavtp.config.sizes import ffn_hidden, resolve_model
from megavtp.config.validate import validate, with_vocabulary
from megavtp.decoder.validate import validate_decoder
from megavtp.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
DECODER_RECIPES = sorted([*CONFIGS.glob("decoder/*.yaml"), *CONFIGS.glob("*/decoder_*.yaml")])
RECIPES = sorted(path for folder in ("pretrain", "demo", "showcase") for path in (CONFIGS / folder).glob("vtp_*.yaml"))
BASE = """
model: {size: tiny, image_size: 64, text: {vocab_size: 512}, dino_head: {prototypes: 64, hidden: 32, bottleneck: 8}}
objectives: {self_distillation: {batch: 16}, reconstruction: {batch: 8}}
data: {streams: 8, augment: {global_size: 64, local_size: 32}}
train: {steps: 10, batch_size: 32, optimizer: {warmup_steps: 2}}
"""


@pytest.fixture
def check(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return lambda world, *overrides: validate(load_config(path, Config, overrides), world)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(recipe):
    config = load_config(recipe, Config)
    for dp in (1, 2, 4):
        validate(config, dp * config.parallel.tp * config.parallel.pp)
    check_header(recipe)


@pytest.mark.parametrize("recipe", DECODER_RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_recipes_of_the_decoder_are_valid(recipe):
    config = load_config(recipe, Config)
    for dp in (1, 2, 8):
        validate_decoder(config, dp)
    check_header(recipe)
    first = CONFIGS / "pretrain" / recipe.name
    if first.exists():  # it goes on from what that one has trained, where that one leaves it
        before = load_config(first, Config)
        assert config.model.init_from == f"{before.output_dir}/checkpoints/latest"
        for tower in ("vision", "decoder", "text"):
            assert getattr(config.model, tower) == getattr(before.model, tower)


def check_header(recipe):
    header = recipe.read_text().split("seed:")[0]
    for line in ("expected result", "FLOPs", "memory", "hours", "hardware"):
        assert f"# {line}" in header


@pytest.mark.parametrize("world", [8, 16, 32, 64, 128, 256])
def test_the_study_recipes_fit_clusters(world):
    for size in "sblg":
        recipe = next(p for p in RECIPES if p.stem == f"vtp_{size}")
        names = ("contrastive", "self_distillation", "reconstruction")
        overrides = [f"objectives.{name}.micro_batch=null" for name in names]
        validate(load_config(recipe, Config, overrides), world)


def test_sizes_are_those_of_the_released_models(check):
    for size, width, depth, heads in (("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16), ("g", 1536, 40, 24)):
        model = check(1, f"model.size={size}").model
        assert (model.vision.width, model.vision.depth, model.vision.heads) == (width, depth, heads)
        assert (model.decoder.width, model.decoder.depth, model.decoder.heads) == (width, depth, heads)
        if size != "g":
            assert (model.text.width, model.text.depth, model.text.heads) == (768, 12, 12)
        assert resolve_model(model) == model


def test_given_sizes_stay(check):
    model = check(1, "model.size=l", "model.decoder.depth=4", "model.vision.width=512").model
    assert (model.decoder.width, model.decoder.depth, model.vision.width, model.vision.depth) == (1024, 4, 512, 24)


def test_feed_forward_widths():
    assert [ffn_hidden("swiglu", width, 4.0) for width in (384, 768, 1024)] == [1024, 2048, 2736]
    assert ffn_hidden("swiglu64", 1024, 4.0) == 2752 and ffn_hidden("mlp", 768, 4.0) == 3072


CROSS_RULES = [
    (1, "parallel.sequence_parallel=true", "but parallel.tp = 1: raise parallel.tp, or set parallel.sequence_parallel"),
    (1, "model.vision.heads=5", "model.vision.width = 192 is not a multiple of model.vision.heads = 5"),
    (1, "model.vision.heads=32", "model.vision.width = 192 over model.vision.heads = 32 gives heads of 6 channels"),
    (1, "model.decoder.heads=96", "model.decoder.heads"),
    (1, "model.vision.depth=0", "model.vision.depth = 0: must be between 1 and 256"),
    (1, "model.text.depth=1000000000", "model.text.depth = 1000000000: must be between 1 and 256"),
    (1, "model.vision.width=1000000000000000000", "model.vision.width = 1.*: must be between 1 and 65536"),
    (1, "model.vision.mlp_ratio=1e300", "model.vision.mlp_ratio = .*: must give from 1 to 262144 channels"),
    (1, "model.image_size=96000", "model.image_size = 96000: must be between 1 and 8192"),
    (1, "model.text.vocab_size=1000000000000", "model.text.vocab_size = .*: must be between 1 and 16777216"),
    (1, "model.image_size=72", "model.image_size = 72 is not a multiple of model.patch_size = 16"),
    (1, "objectives.contrastive.image_size=40", "objectives.contrastive.image_size = 40 is not a multiple"),
    (1, "objectives.contrastive.image_size=80", "objectives.contrastive.image_size = 80 is not from 16 to"),
    (1, "objectives.contrastive.image_size=0", "objectives.contrastive.image_size = 0 is not from 16 to"),
    (1, "data.augment.global_size=72", "data.augment.global_size = 72 is not a multiple of model.patch_size"),
    (1, "data.augment.local_size=40", "data.augment.local_size = 40 is not a multiple of model.patch_size"),
    (2, "parallel.tp=2", "model.vision.heads = 3 is not a multiple of parallel.tp = 2"),
    (3, "parallel.tp=3", "feed-forward width = .* is not a multiple of parallel.tp = 3|vocab_size = 512 is not"),
    (3, "parallel.pp=2", "number of processes = 3 is not a multiple of parallel.tp x parallel.pp = 2"),
    (1, "parallel.zero3_gather=step", "parallel.zero3_gather = step, but parallel.zero_stage = auto gathers nothing"),
    (1, "parallel.schedule=gpipe", "parallel.schedule = gpipe, but parallel.pp = 1"),
    (1, "parallel.virtual_stages=2", "parallel.virtual_stages = 2, but parallel.schedule = 1f1b"),
    (16, "parallel.pp=16", "parallel.pp x parallel.virtual_stages = 16 stages, but model.vision.depth = 6"),
    (3, "data.streams=8", "data.streams = 8 is not a multiple of the data-parallel size .* = 3"),
    (1, "train.batch_size=36", "train.batch_size = 36 is not a multiple of data.streams = 8"),
    (1, "objectives.self_distillation.batch=12", "objectives.self_distillation.batch = 12 is not a multiple of data.s"),
    (1, "objectives.reconstruction.batch=12", "objectives.reconstruction.batch = 12 is not a multiple of data.streams"),
    (1, "objectives.self_distillation.batch=64", "self_distillation.batch = 64 exceeds train.batch_size = 32"),
    (1, "objectives.contrastive.micro_batch=5", "batch = 32 is not a multiple of objectives.contrastive.micro_batch"),
    (2, "objectives.reconstruction.micro_batch=8", "batch = 4 is not a multiple of objectives.recon"),
    (1, "train.steps=0", "train.steps = 0: must be at least 1"),
    (1, "train.steps=1", "train.optimizer.warmup_steps = 2 exceeds train.steps = 1"),
    (1, "train.optimizer.min_lr=1", "train.optimizer.min_lr = 1.0 exceeds train.optimizer.lr"),
    (1, "train.optimizer.betas=[0.9, 1.0]", "train.optimizer.betas = .*: each must be below 1"),
    (1, "train.optimizer.betas=[-0.1, 0.9]", "train.optimizer.betas = .*: must be between 0 and 1"),
    (1, "train.optimizer.eps=0", "train.optimizer.eps = 0.0: must be above 0"),
    (1, "train.optimizer.lr_scale.image=1", "train.optimizer.lr_scale.image: no such tower"),
    (1, "train.optimizer.lr_scale.text=-1", "train.optimizer.lr_scale.text = -1.0"),
    (1, "objectives.self_distillation.mask_ratio=[0.5, 0.1]", "mask_ratio = .*0 <= low <= high <= 1"),
    (1, "objectives.self_distillation.teacher_temperature=0", "teacher_temperature = 0.0: must be above 0"),
    (1, "objectives.contrastive.drop_path=1", "objectives.contrastive.drop_path = 1: must be below 1"),
    (1, "objectives.reconstruction.weight=-1", "objectives.reconstruction.weight = -1.0: must be at least 0"),
    (1, "data.augment.global_scale=[0, 1]", "global_scale = .*: must start above 0"),
    (1, "data.augment.blur=[1, 2, 0]", "data.augment.blur = .*: must be between 0 and 1"),
    (1, "data.augment.local_crops=-1", "data.augment.local_crops = -1"),
    (1, "data.streams=0", "data.streams = 0: must be at least 1"),
    (1, "evaluation.templates=[]", "evaluation.templates is empty"),
    (1, "evaluation.templates=[icon]", "evaluation.templates: 'icon' has no {}"),
    (1, "telemetry.peak_tflops=0", "telemetry.peak_tflops = 0.0"),
    (1, "seed=-1", "seed = -1: must be between"),
    (1, "objectives.reconstruction.l1_weight=0 objectives.reconstruction.perceptual=none", "both off: switch one on"),
    (1, "objectives.reconstruction.perceptual=none objectives.reconstruction.perceptual_weights=w.safetensors",
     "perceptual_weights is given but objectives.reconstruction.perceptual is none"),
    (1, "objectives.contrastive.weight=0 objectives.self_distillation.weight=0 objectives.reconstruction.weight=0",
     "are all 0: give at least one a weight above 0"),
    (1, "objectives.contrastive.loss=siglip", "loss = siglip needs model.init_logit_bias: .*model.init_logit_bias=-10"),
    (1, "deepspeed.gradient_clipping=1", "deepspeed.gradient_clipping: is MegaVTP's to set.*train.optimizer.clip_grad"),
    (1, "deepspeed.bf16.enabled=true", "deepspeed.bf16: .*parallel.precision"),
    (1, "deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.stage: .*parallel.zero_stage"),
    (1, "deepspeed.zero_optimization=3", "deepspeed.zero_optimization: expected a mapping"),
    (1, "deepspeed.zero_optimization.overlap_com=true", "did you mean deepspeed.zero_optimization.overlap_comm"),
    (1, "deepspeed.train_batch_size=auto", "deepspeed.train_batch_size: .*train.batch_size"),
    (1, "deepspeed.qqqq=1", "deepspeed.qqqq: not a key of DeepSpeed"),
    (1, "deepspeed.zero_optimization.offload_optimizer.device=cpu", "offload_optimizer: does not work here; remove it"),
]


@pytest.mark.parametrize(("world", "overrides", "match"), CROSS_RULES, ids=[rule[1].split()[0] for rule in CROSS_RULES])
def test_a_broken_rule_names_its_keys(check, world, overrides, match):
    parts = overrides.split(" objectives") if " objectives" in overrides else [overrides]
    parts = [parts[0], *(f"objectives{part}" for part in parts[1:])]
    with pytest.raises(UserError, match=match) as error:
        check(world, *parts)
    assert "\n" not in str(error.value)


def test_overlapping_reduction_needs_zero(check):
    with pytest.raises(UserError, match="overlap_comm needs parallel.zero_stage 1, 2 or 3, not 0"):
        check(1, "deepspeed.zero_optimization.overlap_comm=true", "parallel.zero_stage=0")
    check(1, "deepspeed.zero_optimization.overlap_comm=true")


def test_zero_shares_only_between_several_data_parallel_ranks():
    stages = {(given, dp): ParallelConfig(zero_stage=given).zero_on(dp) for given in ("auto", 0, 3) for dp in (1, 2)}
    assert stages == {("auto", 1): 0, ("auto", 2): 1, (0, 1): 0, (0, 2): 0, (3, 1): 3, (3, 2): 3}


def test_interleaving_needs_virtual_stages(check):
    with pytest.raises(UserError, match="parallel.schedule = interleaved_1f1b needs parallel.virtual_stages of 2"):
        check(2, "parallel.pp=2", "parallel.schedule=interleaved_1f1b")
    check(2, "parallel.pp=2", "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=3")


def test_rules_of_an_objective_that_is_off_do_not_bind(check):
    check(1, "objectives.self_distillation.weight=0", "objectives.self_distillation.batch=999",
          "data.augment.global_size=70")
    check(1, "objectives.reconstruction.weight=0", "model.patch_size=8", "objectives.reconstruction.batch=999")
    check(2, "parallel.tp=2", "model.vision.heads=6", "objectives.contrastive.weight=0", "model.decoder.heads=4",
          "model.text.heads=1")
    check(1, "data.augment.local_crops=0", "data.augment.local_size=41")


def test_without_a_world_size_the_layout_is_not_checked(check):
    check(None, "parallel.pp=2", "objectives.contrastive.micro_batch=5")


def test_the_share_of_a_rank(check):
    config = check(4, "objectives.contrastive.micro_batch=2", "objectives.reconstruction.weight=0")
    mine = share(config, 4)
    assert mine.images == 8
    assert mine.passes == {"contrastive": PassShare(32, 8, 2), "self_distillation": PassShare(16, 4, 4)}
    assert list(mine.passes) == ["contrastive", "self_distillation"]
    assert [part.micro_batches for part in mine.passes.values()] == [4, 1]


def test_the_vocabulary_is_the_tokenizers(check):
    assert with_vocabulary(check(1, "model.text.vocab_size=null"), 520).model.text.vocab_size == 520
    assert with_vocabulary(check(1), 512).model.text.vocab_size == 512
    with pytest.raises(UserError, match="model.text.vocab_size = 512, but the tokenizer of data.captions = auto has"):
        with_vocabulary(check(1), 520)
    heads = [f"model.{tower}.heads=6" for tower in ("vision", "text", "decoder")]
    with pytest.raises(UserError, match="data.captions = 511 is not a multiple of parallel.tp = 2"):
        with_vocabulary(check(2, "parallel.tp=2", *heads, "model.text.vocab_size=null"), 511)
