"""The rules that concern one number or one pair of numbers, and the functions that all rules are written with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megavtp.config.schema import AdversarialConfig, AugmentConfig, Config, EvaluationConfig, SelfDistillationConfig
from megavtp.config.sizes import TOWERS
from megavtp.errors import UserError

INF = float("inf")
# These bounds of a model lie far above what is ever trained. A larger number is a slip or damage, and must be refused
# before memory is allocated for it.
MAX_WIDTH, MAX_DEPTH, MAX_PIXELS, MAX_ROWS = 65_536, 256, 8192, 16_777_216
# A whole number whose rule has no upper end may be at most this: a larger one is a slip that would show only late.
_MOST = 1_000_000_000
_MOST_OF = {
    "workers": 1024, "prefetch": 1024, "batch_size": 16_777_216, "local_crops": 256, "pictures": 1024,
    "max_pixels": 10_000_000_000, "sinkhorn_iterations": 1000,
}


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
    """Check that each number lies between ``low`` and ``high``; whole numbers are at most ``_MOST`` in any case."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            most = _MOST_OF.get(name, _MOST) if high == INF and isinstance(number, int) else high
            wanted = f"at least {low:g}" if high == INF else f"between {low:g} and {high:.8g}"
            wanted = f"at most {most:,}" if number > most != high else wanted
            need(low <= number <= most, f"{prefix}.{name} = {value}: must be {wanted}")


def ordered(config: Any, prefix: str, *names: str) -> None:
    """Check that each key is a range (low, high) with 0 <= low <= high <= 1."""
    for name in names:
        low, high = getattr(config, name)
        need(0 <= low <= high <= 1, f"{prefix}.{name} = [{low:g}, {high:g}]: must have 0 <= low <= high <= 1")


def check_run(config: Any, towers: Sequence[str]) -> None:
    """Check the numbers that every kind of run has. ``towers`` are those whose learning rate can be scaled."""
    train, data, optimizer = config.train, config.data, config.train.optimizer
    need(0 <= config.seed < 2**63, f"seed = {config.seed}: must be between 0 and 2**63 - 1")
    within(train, "train", 1, INF, "steps", "batch_size", "keep_last")
    within(train, "train", 0, INF, "checkpoint_every", "max_skipped_steps")
    within(optimizer, "train.optimizer", 0, INF, "lr", "min_lr", "warmup_steps", "weight_decay", "clip_grad")
    within(optimizer, "train.optimizer", 0, 1, "betas")
    need(max(optimizer.betas) < 1, f"train.optimizer.betas = {list(optimizer.betas)}: each must be below 1")
    need(optimizer.eps > 0, f"train.optimizer.eps = {optimizer.eps}: must be above 0")
    need(
        optimizer.warmup_steps <= train.steps,
        f"train.optimizer.warmup_steps = {optimizer.warmup_steps} exceeds train.steps = {train.steps}: shorten it",
    )
    need(
        optimizer.min_lr <= optimizer.lr,
        f"train.optimizer.min_lr = {optimizer.min_lr} exceeds train.optimizer.lr = {optimizer.lr}: lower min_lr",
    )
    need(
        optimizer.cooldown is None or 0 <= optimizer.cooldown <= 1,
        f"train.optimizer.cooldown = {optimizer.cooldown}: must be a fraction of the steps, between 0 and 1, or null",
    )
    for name, scale in optimizer.lr_scale.items():
        need(name in towers, f"train.optimizer.lr_scale.{name}: no such tower; the towers are {', '.join(towers)}")
        need(scale >= 0, f"train.optimizer.lr_scale.{name} = {scale}: must be at least 0")
    within(data, "data", 1, INF, "streams", "shuffle_block", "prefetch")
    within(data, "data", 0, INF, "workers", "max_bad_samples")
    within(config.parallel, "parallel", 1, INF, "tp", "pp", "virtual_stages")
    within(config.parallel, "parallel", 0, 10_000_000, "timeout")
    within(config.telemetry, "telemetry", 1, INF, "log_every")
    peak = config.telemetry.peak_tflops
    need(peak is None or peak > 0, f"telemetry.peak_tflops = {peak}: must be above 0, or null")


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Check each number of the evaluation by itself."""
    within(evaluation, "evaluation", 1, INF, "batch_size", "max_samples", "knn")
    within(evaluation, "evaluation", 0, INF, "every")


def check_numbers(config: Config) -> None:
    """Check each number of a pre-training run by itself."""
    check_run(config, TOWERS)
    data, o = config.data, config.objectives
    within(data, "data", 1, INF, "max_pixels")
    within(config.telemetry, "telemetry", 1, INF, "pictures")
    within(config.telemetry, "telemetry", 0, INF, "pictures_every")
    check_evaluation(config.evaluation)
    for name in ("contrastive", "self_distillation", "reconstruction"):
        objective, prefix = getattr(o, name), f"objectives.{name}"
        within(objective, prefix, 0, INF, "weight")
        within(objective, prefix, 0, 1, "drop_path")
        need(objective.drop_path < 1, f"{prefix}.drop_path = 1: must be below 1, or no block would train")
        if objective.micro_batch is not None:
            within(objective, prefix, 1, INF, "micro_batch")
    need(o.contrastive.max_scale > 0, f"objectives.contrastive.max_scale = {o.contrastive.max_scale}: must be above 0")
    within(o.reconstruction, "objectives.reconstruction", 0, INF, "l1_weight", "perceptual_weight", "latent_noise")
    within(o.reconstruction, "objectives.reconstruction", 0, 1, "latent_noise_share")
    within(o.reconstruction, "objectives.reconstruction", 1, INF, "batch")
    within(o.reconstruction, "objectives.reconstruction", 0, 1, "decoder_momentum")
    need(
        o.reconstruction.decoder_momentum < 1,
        "objectives.reconstruction.decoder_momentum = 1: must be below 1, or the average would never move",
    )
    _adversarial(o.adversarial)
    _self_distillation(o.self_distillation)
    _augment(data.augment)
    need(config.model.init_std > 0, f"model.init_std = {config.model.init_std}: must be above 0")
    templates = config.evaluation.templates
    need(bool(templates), "evaluation.templates is empty: give at least one, such as ['{}']")
    for template in templates:
        need("{}" in template, f"evaluation.templates: {template!r} has no {{}}, the place of the class name")


def _self_distillation(ssl: SelfDistillationConfig) -> None:
    prefix = "objectives.self_distillation"
    within(ssl, prefix, 1, INF, "batch", "sinkhorn_iterations", "chunk")
    within(ssl, prefix, 0, INF, "dino_weight", "ibot_weight", "koleo_weight")
    within(ssl, prefix, 0, 1, "center_momentum", "teacher_momentum", "teacher_momentum_end")
    within(ssl, prefix, 0, 1, "teacher_temperature_warmup", "freeze_last_layer", "mask_probability")
    ordered(ssl, prefix, "mask_ratio")
    for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
        need(getattr(ssl, name) > 0, f"{prefix}.{name} = {getattr(ssl, name)}: must be above 0")


def _adversarial(adversarial: AdversarialConfig) -> None:
    prefix = "objectives.adversarial"
    within(adversarial, prefix, 0, INF, "weight", "brightness", "saturation", "contrast")
    within(adversarial, prefix, 0, 1, "discriminator_start", "start", "translation")
    if adversarial.features_size is not None:
        within(adversarial, prefix, 1, MAX_PIXELS, "features_size")


def _augment(augment: AugmentConfig) -> None:
    prefix = "data.augment"
    within(augment, prefix, 0, 1, "plain_flip", "plain_color_jitter", "plain_grayscale")
    within(augment, prefix, 0, 1, "flip", "color_jitter", "grayscale", "blur", "solarize")
    within(augment, prefix, 0, INF, "local_crops")
    within(augment, prefix, 1, MAX_PIXELS, "global_size", "local_size")
    ordered(augment, prefix, "plain_scale", "global_scale", "local_scale")
    for name in ("plain_scale", "global_scale", "local_scale"):
        need(getattr(augment, name)[0] > 0, f"{prefix}.{name} = {list(getattr(augment, name))}: must start above 0")
