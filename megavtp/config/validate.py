"""The rules between keys, checked before anything runs. Each error names the keys in question and the remedy."""

from dataclasses import replace

from megavtp.config import deepspeed_keys, layout
from megavtp.config.precision import with_precision
from megavtp.config.ranges import MAX_WIDTH, check_ranges, check_run, divides, need, ordered
from megavtp.config.schema import Config, ModelConfig
from megavtp.config.share import share
from megavtp.config.sizes import (
    DECODER_MLP_RATIO,
    OBJECTIVES,
    TOWERS,
    ResolvedConfig,
    ResolvedModel,
    contrastive_size,
    ffn_hidden,
    narrowed,
    resolve_model,
)


def validate(config: Config, world_size: int | None) -> ResolvedConfig:
    """Check ``config`` for a run on ``world_size`` processes and fill the model's sizes.

    ``world_size`` None checks everything but the rules that need it. Raises UserError.
    """
    resolved = narrowed(
        config, ResolvedConfig, model=check_model(config.model), parallel=with_precision(config.parallel)
    )
    check_run(resolved, TOWERS)
    _numbers(resolved)
    _objectives(resolved)
    _model(resolved)
    _tensor_parallel(resolved)
    layout.check_pipeline(resolved.parallel, resolved.model.vision.depth, "model.vision.depth", "encoder")
    _batches(resolved)
    deepspeed_keys.check(resolved.deepspeed, resolved.parallel.zero_stage)
    if world_size is not None:
        dp = layout.data_parallel_size(resolved, world_size)
        for name, part in share(resolved, dp).passes.items():
            layout.check_micro_batch(part, f"objectives.{name}", f"the {name} batch", dp)
    return resolved


def with_vocabulary(config: ResolvedConfig, vocab_size: int) -> ResolvedConfig:
    """Set ``model.text.vocab_size`` to that of the caption tokenizer; if it was given, it must be the same."""
    given, tp = config.model.text.vocab_size, config.parallel.tp
    need(
        given in (None, vocab_size),
        f"model.text.vocab_size = {given}, but the tokenizer of data.captions = {config.data.captions} has "
        f"{vocab_size} ids: set model.text.vocab_size=null, which takes the tokenizer's",
    )
    divides(tp, vocab_size, "parallel.tp", "the vocabulary of data.captions", "use a tp that divides it")
    text = replace(config.model.text, vocab_size=vocab_size)
    return replace(config, model=replace(config.model, text=text))


def _numbers(config: ResolvedConfig) -> None:
    """Check what no ``Range`` says of a single key."""
    o, augment = config.objectives, config.data.augment
    for name in OBJECTIVES:
        dropped = getattr(o, name).drop_path
        need(dropped < 1, f"objectives.{name}.drop_path = 1: must be below 1, or no block would train")
    need(
        o.reconstruction.decoder_momentum < 1,
        "objectives.reconstruction.decoder_momentum = 1: must be below 1, or the average would never move",
    )
    need(config.model.init_std > 0, f"model.init_std = {config.model.init_std}: must be above 0")
    ordered(o.self_distillation, "objectives.self_distillation", "mask_ratio")
    for name in ("plain_scale", "global_scale", "local_scale"):
        ordered(augment, "data.augment", name)
        scale = getattr(augment, name)
        need(scale[0] > 0, f"data.augment.{name} = {list(scale)}: must start above 0")
    templates = config.evaluation.templates
    need(bool(templates), "evaluation.templates is empty: give at least one, such as ['{}']")
    for template in templates:
        need("{}" in template, f"evaluation.templates: {template!r} has no {{}}, the place of the class name")


def _objectives(config: ResolvedConfig) -> None:
    o = config.objectives
    need(
        o.contrastive.weight > 0 or o.self_distillation.weight > 0 or o.reconstruction.weight > 0,
        "objectives.contrastive.weight, objectives.self_distillation.weight and objectives.reconstruction.weight "
        "are all 0: give at least one a weight above 0",
    )
    need(
        o.contrastive.weight == 0 or o.contrastive.loss != "siglip" or config.model.init_logit_bias is not None,
        "objectives.contrastive.loss = siglip needs model.init_logit_bias: nearly no pair belongs together, and it "
        "starts there; set model.init_logit_bias=-10 and model.init_logit_scale=2.3026, as the SigLIP paper does",
    )
    rec, ssl = o.reconstruction, o.self_distillation
    need(
        rec.weight == 0 or rec.l1_weight > 0 or (rec.perceptual != "none" and rec.perceptual_weight > 0),
        "objectives.reconstruction.l1_weight and its perceptual term are both off: switch one on, "
        "or set objectives.reconstruction.weight=0",
    )
    need(
        rec.perceptual != "none" or rec.perceptual_weights is None,
        "objectives.reconstruction.perceptual_weights is given but objectives.reconstruction.perceptual is none: "
        "remove one of them",
    )
    need(
        ssl.weight == 0 or ssl.dino_weight > 0 or ssl.ibot_weight > 0 or ssl.koleo_weight > 0,
        "objectives.self_distillation.dino_weight, ibot_weight and koleo_weight are all 0: give one a weight above 0, "
        "or set objectives.self_distillation.weight=0",
    )


def check_stored(config: Config) -> ResolvedConfig:
    """Fill the model's sizes; check what is built and evaluated of a checkpoint, not the rules of a run. UserError."""
    check_ranges(config.evaluation, "evaluation.")
    return narrowed(config, ResolvedConfig, model=check_model(config.model))


def check_model(given: ModelConfig) -> ResolvedModel:
    """Fill the sizes of the model of a recipe or of a file with weights, and check each by itself. UserError."""
    model = resolve_model(given)
    check_ranges(model, "model.")
    for name in ("vision", "text", "decoder"):
        _tower(model, name)
    _whole_patches(model, model.image_size, "model.image_size")
    return model


def _whole_patches(model: ResolvedModel, size: int, key: str) -> None:
    divides(model.patch_size, size, "model.patch_size", key, "choose a size in whole patches")


def _model(config: ResolvedConfig) -> None:
    model, o, augment = config.model, config.objectives, config.data.augment
    _whole_patches(model, contrastive_size(config), "objectives.contrastive.image_size")
    need(
        0 < contrastive_size(config) <= model.image_size,
        f"objectives.contrastive.image_size = {o.contrastive.image_size} is not from {model.patch_size} to "
        f"model.image_size = {model.image_size}: choose a size in between, or null",
    )
    if o.reconstruction.weight > 0:
        need(
            o.reconstruction.perceptual != "lpips-alex" or model.image_size >= 32,
            f"objectives.reconstruction.perceptual = lpips-alex needs model.image_size >= 32, not {model.image_size}: "
            "enlarge the image, or use lpips-vgg",
        )
    if o.self_distillation.weight > 0:
        _whole_patches(model, augment.global_size, "data.augment.global_size")
        if augment.local_crops:
            _whole_patches(model, augment.local_size, "data.augment.local_size")


def _tower(model: ResolvedModel, name: str) -> None:
    tower, prefix = getattr(model, name), f"model.{name}"
    divides(tower.heads, tower.width, f"{prefix}.heads", f"{prefix}.width", "change one of them")
    if name != "text":
        layout.check_rotary(tower, prefix)
    if hasattr(tower, "mlp_ratio"):
        hidden = tower.mlp_ratio * tower.width
        need(
            1 <= hidden <= 4 * MAX_WIDTH,
            f"{prefix}.mlp_ratio = {tower.mlp_ratio}: must give from 1 to {4 * MAX_WIDTH} channels, not {hidden:g}",
        )


def _tensor_parallel(config: ResolvedConfig) -> None:
    model = config.model
    sizes = {
        "model.vision.heads": model.vision.heads,
        "model.vision's feed-forward width": ffn_hidden(model.vision.ffn, model.vision.width, model.vision.mlp_ratio),
    }
    if config.objectives.contrastive.weight > 0:
        sizes["model.text.heads"] = model.text.heads
        sizes["model.text's feed-forward width"] = ffn_hidden("mlp", model.text.width, model.text.mlp_ratio)
        if model.text.vocab_size is not None:
            sizes["model.text.vocab_size"] = model.text.vocab_size
        if not model.bottleneck_reconstruction_only:
            sizes["model.bottleneck"] = model.bottleneck
    if config.objectives.reconstruction.weight > 0:
        sizes["model.decoder.heads"] = model.decoder.heads
        sizes["model.decoder's feed-forward width"] = ffn_hidden(
            model.decoder.ffn, model.decoder.width, DECODER_MLP_RATIO
        )
    if config.objectives.self_distillation.weight > 0:
        sizes["model.dino_head.prototypes"] = model.dino_head.prototypes
        sizes["model.dino_head.hidden"] = model.dino_head.hidden
    layout.check_tensor_parallel(config.parallel, sizes)


def _batches(config: ResolvedConfig) -> None:
    streams, batch = config.data.streams, config.train.batch_size
    layout.check_streams(streams, batch, "train.batch_size")
    for name in ("self_distillation", "reconstruction"):
        objective = getattr(config.objectives, name)
        if objective.weight == 0:
            continue
        key = f"objectives.{name}.batch"
        need(objective.batch <= batch, f"{key} = {objective.batch} exceeds train.batch_size = {batch}: lower it")
        layout.check_streams(streams, objective.batch, key)
