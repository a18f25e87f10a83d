"""What ``model.size`` stands for, and the types of a configuration whose sizes are known.

A configuration as the user writes it may leave sizes open (``None``); what is built from it may not. So the two have
different types, and no ``None`` travels into a model.

s, b, l: the released VTP models (encoder and decoder alike, one 12 x 768 text tower). g is not a released size: its
encoder has the shape of DINOv2's ViT-g (1536 x 40, 24 heads), its text tower that of OpenCLIP's ViT-bigG-14.
tiny is for a demonstration on a CPU. The 4-layer ViT-L decoder of the paper's scaling studies is set in a recipe.
"""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from megavtp.arithmetic import ceil_div
from megavtp.config.ranges import Depth, Width
from megavtp.config.schema import Config, DecoderConfig, ModelConfig, Size, TextConfig, VisionConfig

Shape = tuple[int, int, int]  # width, depth, heads

OBJECTIVES = ("contrastive", "self_distillation", "reconstruction")  # in the order in which a step runs them
TOWERS = ("vision", "text", "decoder", "dino_head", "discriminator")  # learning rates and gradient norms are per tower
GLOBAL_CROPS = 2  # of each image in self-distillation; DINO's cross-view term compares the two
DECODER_MLP_RATIO = 4.0  # the official config has no key for it

VISION: dict[Size, Shape] = {
    "tiny": (192, 6, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24),
}
TEXT: dict[Size, Shape] = {
    "tiny": (192, 3, 3), "s": (768, 12, 12), "b": (768, 12, 12), "l": (768, 12, 12), "g": (1280, 32, 20),
}
DECODER: dict[Size, Shape] = {**VISION, "tiny": (192, 4, 3)}


@dataclass(frozen=True)
class Resolved:
    """A transformer whose shape is known."""

    width: Width = field(kw_only=True)
    depth: Depth = field(kw_only=True)
    heads: Width = field(kw_only=True)


@dataclass(frozen=True)
class ResolvedVision(Resolved, VisionConfig): ...


@dataclass(frozen=True)
class ResolvedText(Resolved, TextConfig):
    """A text tower whose vocabulary size may still be open: the caption tokenizer decides it."""


@dataclass(frozen=True)
class ResolvedDecoder(Resolved, DecoderConfig): ...


Tower = ResolvedVision | ResolvedText | ResolvedDecoder


@dataclass(frozen=True)
class ResolvedModel(ModelConfig):
    vision: ResolvedVision = field(kw_only=True)
    text: ResolvedText = field(kw_only=True)
    decoder: ResolvedDecoder = field(kw_only=True)


@dataclass(frozen=True)
class ResolvedConfig(Config):
    model: ResolvedModel = field(kw_only=True)


R = TypeVar("R")


def known(size: int | None, key: str) -> int:
    """Return a size that comes from the data; ValueError if it is still open when the model is built."""
    if size is None:
        raise ValueError(f"{key} is still open when the model is built")
    return size


def narrowed(config: Any, kind: type[R], **values: Any) -> R:
    """Make a ``kind``, whose field types are narrower, from the fields of ``config``; ``values`` replace some."""
    return kind(**{f.name: getattr(config, f.name) for f in fields(config)} | values)


def resolve_model(model: ModelConfig) -> ResolvedModel:
    """Fill each tower's width, depth and heads that are None from ``model.size``. Idempotent."""
    return narrowed(
        model, ResolvedModel,
        vision=filled(model.vision, ResolvedVision, VISION[model.size]),
        text=filled(model.text, ResolvedText, TEXT[model.size]),
        decoder=filled(model.decoder, ResolvedDecoder, DECODER[model.size]),
    )


def filled(tower: Any, kind: type[R], shape: Shape) -> R:
    """Return ``tower`` as a ``kind`` whose width, depth and heads, where they are None, are those of ``shape``."""
    sizes = dict(zip(("width", "depth", "heads"), shape))
    return narrowed(tower, kind, **{name: sizes[name] for name in sizes if getattr(tower, name) is None})


def adversarial_starts(config: Config) -> tuple[int, int]:
    """Return the steps, counted from 0, in which the discriminator begins to learn and to teach the decoder."""
    settings, steps = config.objectives.adversarial, config.train.steps
    return round(settings.discriminator_start * steps), round(settings.start * steps)


def contrastive_size(config: Config) -> int:
    """Return the side, in pixels, of the images of the contrastive objective."""
    size = config.objectives.contrastive.image_size
    return config.model.image_size if size is None else size


def feature_width(model: ResolvedModel) -> int:
    """Return the channels of the features that the contrastive and self-distillation objectives read."""
    return model.vision.width if model.bottleneck_reconstruction_only else model.bottleneck


def ffn_hidden(kind: str, width: int, ratio: float) -> int:
    """Return a feed-forward layer's hidden width: ``ratio * width`` ("mlp"), or 2/3 of it rounded up ("swiglu...")."""
    hidden = int(width * ratio)
    if kind == "mlp":
        return hidden
    align = int(kind.removeprefix("swiglu") or 8)
    return ceil_div(int(hidden * 2 / 3), align) * align
