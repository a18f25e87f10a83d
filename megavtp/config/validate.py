"""The rules between keys, checked before anything runs. Each error names the keys in question and the remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megavtp.config import deepspeed_keys
from megavtp.config.schema import AugmentConfig, Config, ModelConfig, SelfDistillationConfig
from megavtp.config.share import Share, share
from megavtp.config.sizes import ffn_hidden, resolve_model
from megavtp.errors import UserError

__all__ = ["Share", "share", "validate", "with_vocabulary"]

TOWERS = ("vision", "text", "decoder", "dino_head")
DECODER_UPSCALE = 16  # pixels of one latent's side in the released decoder, whatever the encoder's patch


def need(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition``."""
    if not condition:
        raise UserError(message)


def divides(small: int, big: int, small_key: str, big_key: str, remedy: str) -> None:
    need(
        small > 0 and big % small == 0,
        f"{big_key} = {big} is not a multiple of {small_key} = {small}: {remedy}",
    )


def within(config: Any, prefix: str, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            need(low <= number <= high, f"{prefix}.{name} = {value}: must be {_interval(low, high)}")


def _interval(low: float, high: float) -> str:
    return f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"


def ordered(config: Any, prefix: str, *names: str) -> None:
    """Ranges (low, high) with 0 <= low <= high <= 1."""
    for name in names:
        low, high = getattr(config, name)
        need(0 <= low <= high <= 1, f"{prefix}.{name} = [{low:g}, {high:g}]: must be [low, high] with 0 <= low <= high <= 1")


def validate(config: Config, world_size: int | None) -> Config:
    """Check ``config`` for a run on ``world_size`` processes and fill the model's sizes.

    ``world_size`` None checks everything but the rules that need it. Raises UserError.
    """
    config = replace(config, model=resolve_model(config.model))
    _numbers(config)
    _objectives(config)
    _model(config)
    _tensor_parallel(config)
    _batches(config)
    deepspeed_keys.check(config.deepspeed)
    if world_size is not None:
        _layout(config, world_size)
    return config


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """``config`` with the caption tokenizer's ``vocab_size``, which ``model.text.vocab_size`` must equal if given."""
    given, tp = config.model.text.vocab_size, config.parallel.tp
    need(
        given in (None, vocab_size),
        f"model.text.vocab_size = {given}, but the tokenizer of data.captions = {config.data.captions} has "
        f"{vocab_size} ids: set model.text.vocab_size=null, which takes the tokenizer's",
    )
    divides(tp, vocab_size, "parallel.tp", "the vocabulary of data.captions", "use a tp that divides it")
    text = replace(config.model.text, vocab_size=vocab_size)
    return replace(config, model=replace(config.model, text=text))


def _numbers(config: Config) -> None:
    """Each number by itself."""
    inf = float("inf")
    train, data, optimizer, o = config.train, config.data, config.train.optimizer, config.objectives
    within(config, "config", 0, 2**63 - 1, "seed")
    within(train, "train", 1, inf, "steps", "batch_size", "keep_last")
    within(train, "train", 0, inf, "checkpoint_every", "max_skipped_steps")
    within(optimizer, "train.optimizer", 0, inf, "lr", "min_lr", "warmup_steps", "weight_decay", "clip_grad")
    within(optimizer, "train.optimizer", 0, 1, "betas")
    need(max(optimizer.betas) < 1, f"train.optimizer.betas = {list(optimizer.betas)}: each must be below 1")
    need(optimizer.eps > 0, f"train.optimizer.eps = {optimizer.eps}: must be above 0")
    within(data, "data", 1, inf, "streams", "shuffle_block", "prefetch", "max_pixels")
    within(data, "data", 0, inf, "workers", "max_bad_samples")
    within(config.parallel, "parallel", 1, inf, "tp", "pp")
    within(config.telemetry, "telemetry", 1, inf, "log_every", "pictures")
    within(config.telemetry, "telemetry", 0, inf, "pictures_every")
    within(config.evaluation, "evaluation", 1, inf, "batch_size", "max_samples", "knn")
    within(config.evaluation, "evaluation", 0, inf, "every")
    for name in ("contrastive", "self_distillation", "reconstruction"):
        objective, prefix = getattr(o, name), f"objectives.{name}"
        within(objective, prefix, 0, inf, "weight")
        within(objective, prefix, 0, 1, "drop_path")
        need(objective.drop_path < 1, f"{prefix}.drop_path = 1: must be below 1, or no block would train")
        if objective.micro_batch is not None:
            within(objective, prefix, 1, inf, "micro_batch")
    need(o.contrastive.max_scale > 0, f"objectives.contrastive.max_scale = {o.contrastive.max_scale}: must be above 0")
    within(o.reconstruction, "objectives.reconstruction", 0, inf, "l1_weight", "perceptual_weight")
    within(o.reconstruction, "objectives.reconstruction", 1, inf, "batch")
    _self_distillation(o.self_distillation)
    _augment(data.augment)
    _between_numbers(config)


def _self_distillation(ssl: SelfDistillationConfig) -> None:
    prefix, inf = "objectives.self_distillation", float("inf")
    within(ssl, prefix, 1, inf, "batch", "sinkhorn_iterations", "chunk")
    within(ssl, prefix, 0, inf, "dino_weight", "ibot_weight", "koleo_weight")
    within(ssl, prefix, 0, 1, "center_momentum", "teacher_momentum", "teacher_momentum_end", "teacher_temperature_warmup")
    within(ssl, prefix, 0, 1, "freeze_last_layer", "mask_probability")
    ordered(ssl, prefix, "mask_ratio")
    for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
        need(getattr(ssl, name) > 0, f"{prefix}.{name} = {getattr(ssl, name)}: must be above 0")


def _augment(augment: AugmentConfig) -> None:
    prefix = "data.augment"
    within(augment, prefix, 0, 1, "plain_flip", "flip", "color_jitter", "grayscale", "blur", "solarize")
    within(augment, prefix, 0, float("inf"), "local_crops")
    within(augment, prefix, 1, float("inf"), "global_size", "local_size")
    ordered(augment, prefix, "plain_scale", "global_scale", "local_scale")
    for name in ("plain_scale", "global_scale", "local_scale"):
        need(getattr(augment, name)[0] > 0, f"{prefix}.{name} = {list(getattr(augment, name))}: must start above 0")


def _between_numbers(config: Config) -> None:
    train, optimizer = config.train, config.train.optimizer
    need(
        optimizer.warmup_steps <= train.steps,
        f"train.optimizer.warmup_steps = {optimizer.warmup_steps} exceeds train.steps = {train.steps}: shorten the warm-up",
    )
    need(
        optimizer.min_lr <= optimizer.lr,
        f"train.optimizer.min_lr = {optimizer.min_lr} exceeds train.optimizer.lr = {optimizer.lr}: lower min_lr",
    )
    for name, scale in optimizer.lr_scale.items():
        need(name in TOWERS, f"train.optimizer.lr_scale.{name}: no such tower; the towers are {', '.join(TOWERS)}")
        need(scale >= 0, f"train.optimizer.lr_scale.{name} = {scale}: must be at least 0")
    peak = config.telemetry.peak_tflops
    need(peak is None or peak > 0, f"telemetry.peak_tflops = {peak}: must be above 0, or null")
    templates = config.evaluation.templates
    need(bool(templates), "evaluation.templates is empty: give at least one, such as ['{}']")
    for template in templates:
        need("{}" in template, f"evaluation.templates: {template!r} has no {{}}, the place of the class name")


def _objectives(config: Config) -> None:
    o = config.objectives
    need(
        o.contrastive.weight > 0 or o.self_distillation.weight > 0 or o.reconstruction.weight > 0,
        "objectives.contrastive.weight, objectives.self_distillation.weight and objectives.reconstruction.weight "
        "are all 0: give at least one a weight above 0",
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


def _model(config: Config) -> None:
    model, o, augment = config.model, config.objectives, config.data.augment
    for name in ("vision", "text", "decoder"):
        _tower(model, name)
    within(model, "model", 1, float("inf"), "image_size", "patch_size", "bottleneck")
    within(model.text, "model.text", 2, float("inf"), "context_length")
    within(model.dino_head, "model.dino_head", 1, float("inf"), "prototypes", "hidden", "bottleneck", "layers")
    crop = "choose a size in whole patches"
    divides(model.patch_size, model.image_size, "model.patch_size", "model.image_size", crop)
    if o.reconstruction.weight > 0:
        need(
            model.patch_size == DECODER_UPSCALE,
            f"model.patch_size = {model.patch_size}, but the pixel decoder draws {DECODER_UPSCALE} pixels per latent: set "
            f"model.patch_size={DECODER_UPSCALE}, or objectives.reconstruction.weight=0",
        )
        need(
            o.reconstruction.perceptual != "lpips-alex" or model.image_size >= 32,
            f"objectives.reconstruction.perceptual = lpips-alex needs model.image_size >= 32, not {model.image_size}: "
            "enlarge the image, or use lpips-vgg",
        )
    if o.self_distillation.weight > 0:
        divides(model.patch_size, augment.global_size, "model.patch_size", "data.augment.global_size", crop)
        if augment.local_crops:
            divides(model.patch_size, augment.local_size, "model.patch_size", "data.augment.local_size", crop)


def _tower(model: ModelConfig, name: str) -> None:
    tower, prefix = getattr(model, name), f"model.{name}"
    within(tower, prefix, 1, float("inf"), "width", "depth", "heads")
    divides(tower.heads, tower.width, f"{prefix}.heads", f"{prefix}.width", "change one of them")
    if name != "text":
        head = tower.width // tower.heads
        need(
            head % 4 == 0,
            f"{prefix}.width = {tower.width} over {prefix}.heads = {tower.heads} gives heads of {head} channels: the "
            "rotary position embedding needs a multiple of 4",
        )
    if hasattr(tower, "mlp_ratio"):
        need(tower.mlp_ratio > 0, f"{prefix}.mlp_ratio = {tower.mlp_ratio}: must be above 0")


def _tensor_parallel(config: Config) -> None:
    model, tp = config.model, config.parallel.tp
    use = "use a tp that divides it"
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
        sizes["model.decoder's feed-forward width"] = ffn_hidden(model.decoder.ffn, model.decoder.width)
    if config.objectives.self_distillation.weight > 0:
        sizes["model.dino_head.prototypes"] = model.dino_head.prototypes
        sizes["model.dino_head.hidden"] = model.dino_head.hidden
    for key, size in sizes.items():
        divides(tp, size, "parallel.tp", key, use)


def _batches(config: Config) -> None:
    """Every batch is an equal slice of every logical stream, whatever the layout."""
    data, batch, o = config.data, config.train.batch_size, config.objectives
    remedy = "every batch is an equal slice of every stream; change one of them"
    divides(data.streams, batch, "data.streams", "train.batch_size", remedy)
    for name in ("self_distillation", "reconstruction"):
        objective = getattr(o, name)
        if objective.weight == 0:
            continue
        key = f"objectives.{name}.batch"
        need(objective.batch <= batch, f"{key} = {objective.batch} exceeds train.batch_size = {batch}: lower it")
        divides(data.streams, objective.batch, "data.streams", key, remedy)


def _layout(config: Config, world_size: int) -> None:
    p = config.parallel
    need(
        p.pp == 1,
        f"parallel.pp = {p.pp}: only parallel.pp=1 is supported by this version; use parallel.zero_stage=3 to save memory",
    )
    divides(p.tp * p.pp, world_size, "parallel.tp x parallel.pp", "the number of processes", "change the launch or tp")
    dp = world_size // (p.tp * p.pp)
    divides(
        dp, config.data.streams, "the data-parallel size (processes / parallel.tp)", "data.streams",
        "set data.streams to a multiple of every data-parallel size you mean to use",
    )
    for name, part in share(config, dp).passes.items():
        divides(
            part.micro_batch, part.local, f"objectives.{name}.micro_batch", f"a rank's share of the {name} batch",
            f"the share is {part.batch} / {dp} data-parallel ranks; use a micro-batch that divides it",
        )
