"""This counts the floating-point operations of a DiT, as ``planning.flops`` does."""

from __future__ import annotations

from megavtp.config.sizes import known
from megavtp.dit.config import TIME_FREQUENCIES, CompleteDiT, swiglu_hidden
from megavtp.planning.flops import transformer_flops


def dit_flops(model: CompleteDiT) -> float:
    """Count the operations of a forward pass of one latent map."""
    width, tokens = model.width, (model.latent_size // model.patch_size) ** 2
    ends = 2 * 2 * tokens * model.patch_size**2 * model.latent_channels * width  # embedding and last layer
    adaptive = 2 * (6 * model.depth + 2) * width**2  # once per sample
    embeddings = 2 * (TIME_FREQUENCIES + width) * width
    if model.condition == "caption":
        embeddings += 2 * (known(model.caption_width, "model.caption_width") + width) * width
    blocks = transformer_flops(tokens, width, model.depth, swiglu_hidden(width), gated=True)
    return ends + adaptive + embeddings + blocks
