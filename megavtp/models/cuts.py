"""This decides where the towers of a VTP are cut into pipeline chunks."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from megavtp.config.sizes import DECODER_MLP_RATIO, ResolvedModel, feature_width, ffn_hidden
from megavtp.parallel.striping import cut_tower

# Rows that go through the DINO head per token that goes through the trunk. Class tokens and masked patches are about
# a tenth of a self-distillation pass, and that pass has some 40 % of a step's tokens.
_HEAD_ROWS = 0.04


def tower_cuts(config: ResolvedModel, objectives: AbstractSet[str], chunks: int) -> dict[str, tuple[range, ...]]:
    """Return the block numbers of each chunk of ``trunk``, ``text`` and ``pixel_decoder``.

    The chunks are balanced by the weights used per token. A tower's blocks are alike; its other layers are at its ends.
    """
    vision, text, decoder, head = config.vision, config.text, config.decoder, config.dino_head
    pixels = 3 * config.patch_size**2
    block = _block(vision.width, vision.ffn, vision.mlp_ratio)
    widths = [feature_width(config), *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    dino = sum(a * b for a, b in zip(widths, widths[1:])) * _HEAD_ROWS if "self_distillation" in objectives else 0
    trunk = cut_tower(
        [1.0] * vision.depth, chunks, first=pixels * vision.width / block,
        last=(vision.width * config.bottleneck + dino) / block,
    )
    of_text = cut_tower(  # only one token of each caption goes through the projection
        [1.0] * text.depth, chunks, last=text.width**2 / text.context_length / _block(text.width, "mlp", text.mlp_ratio)
    )
    block = _block(decoder.width, decoder.ffn, DECODER_MLP_RATIO)
    of_decoder = cut_tower(
        [1.0] * decoder.depth, chunks, first=config.bottleneck * decoder.width / block,
        last=pixels * decoder.width / block,
    )
    return {"trunk": trunk, "text": of_text, "pixel_decoder": of_decoder}


def _block(width: int, ffn: str, ratio: float) -> float:
    """Count the weights of a block's matrices."""
    return 4.0 * width * width + (2 if ffn == "mlp" else 3) * width * ffn_hidden(ffn, width, ratio)
