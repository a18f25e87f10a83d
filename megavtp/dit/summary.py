"""This counts a DiT's weights and operations, and describes its run, without taking memory or reading data."""

import warnings

import torch

from megavtp.config.sizes import known, narrowed
from megavtp.dit.config import TIME_FREQUENCIES, CompleteDiT, ResolvedDiT, ResolvedDiTConfig, swiglu_hidden
from megavtp.dit.model.model import DiT
from megavtp.dit.validate import flow_share
from megavtp.planning.flops import transformer_flops
from megavtp.planning.summary import bytes_of_state, layout_lines, on_a_rank, run_lines


def dit_parameters(model: ResolvedDiT) -> int:
    """Count the trainable parameters of the model on the meta device; sizes that only the latents decide count as
    zero."""
    of_latents = ("latent_size", "latent_channels", "num_classes", "caption_width")
    sizes = {name: getattr(model, name) or 0 for name in of_latents}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a tensor without elements
        dit = DiT(narrowed(model, CompleteDiT, **sizes))
    return sum(parameter.numel() for parameter in dit.parameters())


def dit_flops(model: CompleteDiT) -> float:
    """Count the floating-point operations of a forward pass of one latent map, as ``planning.flops`` does."""
    width, tokens = model.width, (model.latent_size // model.patch_size) ** 2
    ends = 2 * 2 * tokens * model.patch_size**2 * model.latent_channels * width  # embedding and last layer
    adaptive = 2 * (6 * model.depth + 2) * width**2  # once per sample
    embeddings = 2 * (TIME_FREQUENCIES + width) * width
    if model.condition == "caption":
        embeddings += 2 * (known(model.caption_width, "model.caption_width") + width) * width
    blocks = transformer_flops(tokens, width, model.depth, swiglu_hidden(width), gated=True)
    return ends + adaptive + embeddings + blocks


def _shown(size: int | None) -> str:
    return "those of data.root" if size is None else f"{size}"


def dit_summary(config: ResolvedDiTConfig, world_size: int) -> str:
    """Return the page that ``--dry-run`` prints for a validated ``config`` on ``world_size`` processes."""
    p, model, flow = config.parallel, config.model, config.flow_matching
    dp = world_size // (p.tp * p.pp)
    part, count = flow_share(config, dp), dit_parameters(model)
    condition = "captions" if model.condition == "caption" else f"classes: {_shown(model.num_classes)}"
    return "\n".join([
        f"model      DiT-{model.size}, {count / 1e6:.1f} M parameters and their average, width {model.width}, depth "
        f"{model.depth}, heads {model.heads}, patch {model.patch_size}",
        f"           latent positions of a side: {_shown(model.latent_size)}, channels: "
        f"{_shown(model.latent_channels)}, {condition}",
        *layout_lines(p, world_size, bytes_of_state(count, count, p, dp), "average"),
        f"step       {part.batch} latents, {on_a_rank(part)}",
        f"objective  flow matching, times sigmoid({flow.time_mu:g} + {flow.time_sigma:g} z), cosine term "
        f"{flow.cosine_weight:g}, {flow.condition_dropout:.0%} without condition",
        *run_lines(
            config, f"latents, seed {config.seed}, average {config.ema_momentum:g}",
            f"{config.data.root}, flip {config.data.flip:g}",
        ),
    ])
