"""Where the towers of a VTP are cut into pipeline chunks."""

from collections.abc import Set as AbstractSet
from itertools import pairwise

from megavtp.config.sizes import DECODER_MLP_RATIO, ResolvedModel, Tower, feature_width, ffn_hidden
from megavtp.models.dino_head import head_widths
from megavtp.parallel.striping import cut_tower

# Rows that go through the DINO head per token that goes through the trunk. Class tokens and masked patches are about
# a tenth of a self-distillation pass, and that pass has some 40 % of a step's tokens.
_HEAD_ROWS = 0.04


def tower_cuts(config: ResolvedModel, objectives: AbstractSet[str], chunks: int) -> dict[str, tuple[range, ...]]:
    """Return the block numbers of each chunk of ``trunk``, ``text`` and ``pixel_decoder``.

    The chunks are balanced by the weights used per token. A tower's blocks are alike; its other layers are at its ends.
    """
    vision, text, decoder, pixels = config.vision, config.text, config.decoder, 3 * config.patch_size**2
    head = head_widths(feature_width(config), config.dino_head)
    dino = sum(a * b for a, b in pairwise(head)) * _HEAD_ROWS if "self_distillation" in objectives else 0

    def cut(tower: Tower, ffn: str, ratio: float, first: float, last: float) -> tuple[range, ...]:
        width = tower.width
        block = 4.0 * width * width + (2 if ffn == "mlp" else 3) * width * ffn_hidden(ffn, width, ratio)
        return cut_tower([1.0] * tower.depth, chunks, first=first / block, last=last / block)

    trunk_end = vision.width * config.bottleneck + dino
    text_end = text.width**2 / text.context_length  # only one token of each caption goes through the projection
    latents, images = config.bottleneck * decoder.width, pixels * decoder.width
    return {
        "trunk": cut(vision, vision.ffn, vision.mlp_ratio, pixels * vision.width, trunk_end),
        "text": cut(text, "mlp", text.mlp_ratio, 0.0, text_end),
        "pixel_decoder": cut(decoder, decoder.ffn, DECODER_MLP_RATIO, latents, images),
    }
