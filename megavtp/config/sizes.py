"""What ``model.size`` stands for.

s, b, l: the released VTP models (encoder and decoder alike, one 12 x 768 text tower). g is not a released size: its
encoder has the shape of DINOv2's ViT-g (1536 x 40, 24 heads), its text tower that of OpenCLIP's ViT-bigG-14.
tiny is for a demonstration on a CPU. The 4-layer ViT-L decoder of the paper's scaling studies is set in a recipe.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megavtp.config.schema import Config, ModelConfig

Shape = tuple[int, int, int]  # width, depth, heads

TOWERS = ("vision", "text", "decoder", "dino_head")  # what learning rates and gradient norms are told apart by
GLOBAL_CROPS = 2  # of each image in self-distillation: DINO's cross-view term is between the two
DECODER_MLP_RATIO = 4.0  # the official config has no key for the decoder's

VISION: dict[str, Shape] = {
    "tiny": (192, 6, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24),
}
TEXT: dict[str, Shape] = {
    "tiny": (192, 3, 3), "s": (768, 12, 12), "b": (768, 12, 12), "l": (768, 12, 12), "g": (1280, 32, 20),
}
DECODER: dict[str, Shape] = {**VISION, "tiny": (192, 4, 3)}


def _fill(tower: Any, shape: Shape) -> Any:
    given = {name: getattr(tower, name) for name in ("width", "depth", "heads")}
    return replace(tower, **{n: v if given[n] is None else given[n] for n, v in zip(given, shape)})


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Fill each tower's width, depth and heads that are None from ``model.size``. Idempotent."""
    return replace(
        model,
        vision=_fill(model.vision, VISION[model.size]),
        text=_fill(model.text, TEXT[model.size]),
        decoder=_fill(model.decoder, DECODER[model.size]),
    )


def contrastive_size(config: Config) -> int:
    """Pixels of a side of the images of the contrastive objective."""
    size = config.objectives.contrastive.image_size
    return config.model.image_size if size is None else size


def feature_width(model: ModelConfig) -> int:
    """Channels of what the contrastive and self-distillation objectives read."""
    return model.vision.width if model.bottleneck_reconstruction_only else model.bottleneck


def ffn_hidden(kind: str, width: int, ratio: float) -> int:
    """Hidden width of a feed-forward layer: ``ratio * width`` ("mlp"), or 2/3 of it rounded up ("swiglu...")."""
    hidden = int(width * ratio)
    if kind == "mlp":
        return hidden
    align = int(kind.removeprefix("swiglu") or 8)
    return -(-int(hidden * 2 / 3) // align) * align
