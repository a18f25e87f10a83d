"""The settings of a diffusion transformer's training, as frozen dataclasses. A key that is not here is refused.

``None`` means "derived", and the comment says from what. The sections that a DiT shares with pre-training are in
``config/run.py``; the rules between keys are in ``dit/validate.py``.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megavtp.config.ranges import Above0, Depth, Fraction, NotNegative, Positive, Range, Rows, Width
from megavtp.config.run import ReadingConfig, RunConfig
from megavtp.config.sizes import Resolved, Shape, filled, known, narrowed

DiTSize = Literal["tiny", "b", "l", "xl", "1p0b", "1p6b"]
Condition = Literal["class", "caption"]
Side = Annotated[int, Range(1, 512)]  # positions of a latent map's side: 512 are 8192 pixels in patches of 16

# Width, depth, heads of LightningDiT's models; tiny is for a demonstration on a CPU.
SIZES: dict[DiTSize, Shape] = {
    "tiny": (192, 8, 3), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16), "1p0b": (1536, 24, 24),
    "1p6b": (1792, 28, 28),
}
TIME_FREQUENCIES = 256  # channels of the sinusoidal embedding of time


@dataclass(frozen=True)
class DiTModelConfig:
    """A LightningDiT has RMS norms, SwiGLU, rotary and fixed sine positions, and adaptive norms."""

    size: DiTSize = "xl"
    width: Width | None = None  # None = of the size, as depth and heads
    depth: Depth | None = None
    heads: Width | None = None
    patch_size: Side = 1  # latent positions of a token's side
    qk_norm: bool = False
    latent_size: Side | None = None  # positions of the latent map's side; None = that of data.root, as the next
    latent_channels: Width | None = None
    condition: Condition = "class"
    num_classes: Rows | None = None  # None = those of data.root
    caption_width: Width | None = None  # of a caption's feature; None = that of data.root


@dataclass(frozen=True)
class FlowMatchingConfig:
    """The objective (arXiv 2210.02747) has LightningDiT's random times and its cosine term (arXiv 2501.01423)."""

    time_mu: float = 0.0  # t = sigmoid(mu + sigma z): t = 0 is noise, t = 1 data
    time_sigma: Above0 = 1.0
    cosine_weight: NotNegative = 1.0  # of 1 - cosine similarity of the velocities, beside their squared error
    condition_dropout: Fraction = 0.1  # share of the samples that train without class or caption, for guidance
    micro_batch: Positive | None = None  # latents of one data-parallel rank in one forward; None = all of its share


@dataclass(frozen=True)
class LatentDataConfig(ReadingConfig):
    root: str = "data/latents"  # folder of latent shards with the tokenizer's facts and statistics
    flip: Fraction = 0.5  # probability of the latents of the mirrored image


@dataclass(frozen=True)
class DiTConfig(RunConfig):
    output_dir: str = "runs/dit"
    model: DiTModelConfig = field(default_factory=DiTModelConfig)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    ema_momentum: float = 0.9999  # of the averaged weights, which sampling uses
    data: LatentDataConfig = field(default_factory=LatentDataConfig)


@dataclass(frozen=True)
class ResolvedDiT(Resolved, DiTModelConfig):
    """The model's own sizes are known; those of the latents may still be open."""


@dataclass(frozen=True)
class CompleteDiT(ResolvedDiT):
    """The sizes of the latents are known, too, so that a model can be built."""

    latent_size: Side = field(kw_only=True)
    latent_channels: Width = field(kw_only=True)


@dataclass(frozen=True)
class ResolvedDiTConfig(DiTConfig):
    model: ResolvedDiT = field(kw_only=True)


@dataclass(frozen=True)
class CompleteDiTConfig(ResolvedDiTConfig):
    model: CompleteDiT = field(kw_only=True)


def resolve_dit(model: DiTModelConfig) -> ResolvedDiT:
    """Fill the width, depth and heads that are None from ``model.size``. Idempotent."""
    return filled(model, CompleteDiT if isinstance(model, CompleteDiT) else ResolvedDiT, SIZES[model.size])


def complete_dit(model: DiTModelConfig) -> CompleteDiT:
    """Return the model as one whose sizes are all known; ValueError if those of the latents are not."""
    for name in ("latent_size", "latent_channels"):
        known(getattr(model, name), f"model.{name}")
    return filled(model, CompleteDiT, SIZES[model.size])


def complete_config(config: DiTConfig) -> CompleteDiTConfig:
    """Return the configuration with a model whose sizes are all known; ValueError if some are not."""
    return narrowed(config, CompleteDiTConfig, model=complete_dit(config.model))


def swiglu_hidden(width: int) -> int:
    """Return LightningDiT's hidden width: two thirds of four times the width, rounded down."""
    return int(2 / 3 * int(4 * width))
