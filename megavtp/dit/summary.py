"""This describes a DiT's run in a page of text, without taking memory or reading data."""

from __future__ import annotations

import warnings

import torch

from megavtp.config.sizes import narrowed
from megavtp.dit.config import CompleteDiT, ResolvedDiT, ResolvedDiTConfig
from megavtp.dit.model.model import DiT
from megavtp.dit.validate import flow_share
from megavtp.planning.summary import bytes_of_state, optimizer_line


def dit_parameters(model: ResolvedDiT) -> int:
    """Count the trainable parameters of the model on the meta device; sizes that only the latents decide count as
    zero."""
    sizes = {
        name: getattr(model, name) or 0 for name in ("latent_size", "latent_channels", "num_classes", "caption_width")
    }
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a tensor without elements
        dit = DiT(narrowed(model, CompleteDiT, **sizes))
    return sum(parameter.numel() for parameter in dit.parameters())


def _shown(size: int | None) -> str:
    return "those of data.root" if size is None else f"{size}"


def dit_summary(config: ResolvedDiTConfig, world_size: int) -> str:
    """Return the page that ``--dry-run`` prints for a validated ``config`` on ``world_size`` processes."""
    p, train, data, model, flow = config.parallel, config.train, config.data, config.model, config.flow_matching
    dp = world_size // (p.tp * p.pp)
    part, count = flow_share(config, dp), dit_parameters(model)
    condition = "captions" if model.condition == "caption" else f"classes: {_shown(model.num_classes)}"
    memory = bytes_of_state(count, count, config.parallel, dp) / 2**30
    return "\n".join([
        f"model      DiT-{model.size}, {count / 1e6:.1f} M parameters and their average, width {model.width}, depth "
        f"{model.depth}, heads {model.heads}, patch {model.patch_size}",
        f"           latent positions of a side: {_shown(model.latent_size)}, channels: "
        f"{_shown(model.latent_channels)}, {condition}",
        f"layout     {world_size} process{'es' if world_size > 1 else ''} = tp {p.tp} x pp {p.pp} x dp {dp}, "
        f"ZeRO stage {p.zero_stage}, {p.precision}, recompute {p.recompute}, "
        f"sequence parallelism {'on' if p.sequence_parallel else 'off'}, attention {p.attention}",
        f"           about {memory:.2f} GiB of weights, gradients, moments and average on a rank, plus activations",
        f"step       {part.batch} latents, {part.local} on a rank in {part.micro_batches} "
        f"micro-batch{'es' if part.micro_batches > 1 else ''} of {part.micro_batch}",
        f"objective  flow matching, times sigmoid({flow.time_mu:g} + {flow.time_sigma:g} z), cosine term "
        f"{flow.cosine_weight:g}, {flow.condition_dropout:.0%} without condition",
        f"schedule   {train.steps} steps = {train.steps * train.batch_size:,} latents, seed {config.seed}, average "
        f"{config.ema_momentum:g}",
        optimizer_line(train.optimizer),
        f"data       {data.root}, flip {data.flip:g}, {data.streams} streams, "
        f"{data.workers} worker{'' if data.workers == 1 else 's'} a rank",
        f"output     {config.output_dir}, a checkpoint "
        + (f"every {train.checkpoint_every} steps and " if train.checkpoint_every else "")
        + f"at the end, the last {train.keep_last} kept",
    ])
