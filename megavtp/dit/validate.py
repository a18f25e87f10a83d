"""A DiT's keys are checked before anything runs. Each error names the keys and the remedy."""

from dataclasses import replace
from typing import Any

from megavtp.config import deepspeed_keys, layout
from megavtp.config.precision import with_precision
from megavtp.config.ranges import check_ranges, check_run, divides, need, within
from megavtp.config.share import PassShare
from megavtp.config.sizes import narrowed
from megavtp.dit.config import (
    CompleteDiTConfig,
    DiTConfig,
    DiTModelConfig,
    ResolvedDiT,
    ResolvedDiTConfig,
    complete_config,
    resolve_dit,
    swiglu_hidden,
)
from megavtp.latents.folder import LatentFolder

TOWER = "dit"  # the only tower, by which learning rates and gradient norms go


def validate_dit(config: DiTConfig, world_size: int | None) -> ResolvedDiTConfig:
    """Check ``config`` for a run on ``world_size`` processes and fill the model's sizes.

    With ``world_size`` None, the rules that need it are not checked. Raises UserError.
    """
    resolved = narrowed(
        config, ResolvedDiTConfig, model=check_dit_model(config.model), parallel=with_precision(config.parallel)
    )
    check_run(resolved, (TOWER,))
    within(resolved, "config", 0, 1, "ema_momentum")
    need(
        resolved.flow_matching.condition_dropout < 1,
        "flow_matching.condition_dropout = 1: must be below 1, or no sample would train with its class or caption",
    )
    model = resolved.model
    layout.check_tensor_parallel(resolved.parallel, {
        "model.heads": model.heads, "model.width": model.width,
        "the feed-forward width of model.width": swiglu_hidden(model.width),
    })
    layout.check_pipeline(resolved.parallel, model.depth, "model.depth", "DiT")
    layout.check_streams(resolved.data.streams, resolved.train.batch_size, "train.batch_size")
    deepspeed_keys.check(resolved.deepspeed, resolved.parallel.zero_stage)
    if world_size is not None:
        dp = layout.data_parallel_size(resolved, world_size)
        layout.check_micro_batch(flow_share(resolved, dp), "flow_matching", "the batch", dp)
    return resolved


def with_latents(config: ResolvedDiTConfig, folder: LatentFolder) -> CompleteDiTConfig:
    """Return ``config`` with the sizes of the latents in ``folder``; keys that are given must agree with them.

    More classes than the latents have may be given: these may be a part of a data set.
    """
    model = config.model
    channels, size, _ = folder.shape
    found: dict[str, Any] = {"latent_size": size, "latent_channels": channels}
    if model.condition == "caption":
        need(
            folder.caption_width is not None,
            f"model.condition = caption, but the latents in data.root = {config.data.root} have no captions: extract "
            "them with captions, or set model.condition=class",
        )
        found["caption_width"] = folder.caption_width
    else:
        found["num_classes"] = max(folder.num_classes, model.num_classes or 0)
    for key, of_latents in found.items():
        given = getattr(model, key)
        need(
            given in (None, of_latents),
            f"model.{key} = {given}, but the latents in data.root = {config.data.root} have {of_latents}: set "
            f"model.{key}=null, which takes theirs, or another data.root",
        )
    need(
        folder.has_flips or config.data.flip == 0,
        f"data.flip = {config.data.flip}, but data.root = {config.data.root} has no latents of mirrored images: "
        "extract them, or set data.flip=0",
    )
    return complete_config(replace(config, model=check_dit_model(replace(model, **found))))


def flow_share(config: DiTConfig, dp: int) -> PassShare:
    """Return what one of ``dp`` data-parallel ranks does in a step of a validated ``config``."""
    local = config.train.batch_size // dp
    return PassShare(config.train.batch_size, local, config.flow_matching.micro_batch or local)


def check_dit_model(given: DiTModelConfig) -> ResolvedDiT:
    """Fill and check the sizes of a model, which a recipe or a file with weights gives, on their own.

    Raises UserError.
    """
    model = resolve_dit(given)
    check_ranges(model, "model.")
    divides(model.heads, model.width, "model.heads", "model.width", "change one of them")
    layout.check_rotary(model, "model")
    if model.latent_size is not None:
        divides(
            model.patch_size, model.latent_size, "model.patch_size", "model.latent_size", "choose a patch that divides"
        )
    condition = model.condition
    other = "num_classes" if condition == "caption" else "caption_width"
    need(
        getattr(model, other) is None,
        f"model.{other} = {getattr(model, other)} is given, but model.condition = {condition}: remove one of them",
    )
    return model
