"""Floating-point operations of the model and of a training step, from the config alone.

Model FLOPs, the numerator of MFU (PaLM, arXiv 2204.02311, appendix B): a multiply-add is 2; matrix products and
convolutions only; attention without its causal half. A part that trains costs 3 forwards (the gradients
by input and by weight cost one each); parts that pass on a gradient only, or nothing, are noted below. Work that an
implementation repeats to save memory (recompute, the second contrastive forward, chunked logits) is not counted: it
lowers MFU.
"""

from itertools import pairwise

from megavtp.config import sizes
from megavtp.config.schema import DinoHeadConfig
from megavtp.config.share import share
from megavtp.config.sizes import DECODER_MLP_RATIO, GLOBAL_CROPS, ResolvedConfig, ResolvedModel, Tower
from megavtp.models.dino_head import head_widths
from megavtp.models.discriminator import TOKENS_SEEN
from megavtp.models.feature_networks import own_widths
from megavtp.models.lpips import NETS, PERCEPTUAL_NETS

_RGB = 3


def transformer_flops(tokens: int, width: int, depth: int, hidden: int, *, gated: bool) -> float:
    """Count a forward of ``depth`` blocks over one sequence: 2 per weight and token, 4 N^2 D for attention products."""
    weights = 4 * width * width + (3 if gated else 2) * width * hidden
    return float(depth * (2 * weights * tokens + 4 * tokens * tokens * width))


def patches_of(model: ResolvedModel, size: int) -> int:
    """Return the number of patch tokens of a square image of ``size`` pixels."""
    return (size // model.patch_size) ** 2


def _blocks(tower: Tower, tokens: int, ffn: str, ratio: float) -> float:
    """Count a forward of a tower's blocks over one sequence."""
    hidden = sizes.ffn_hidden(ffn, tower.width, ratio)
    return transformer_flops(tokens, tower.width, tower.depth, hidden, gated=ffn != "mlp")


def vision_flops(model: ResolvedModel, size: int, kept: float = 1.0) -> float:
    """Count a forward of the trunk on an image of ``size`` pixels; drop-path leaves a share ``kept`` of blocks."""
    vision, patches = model.vision, patches_of(model, size)
    embedding = 2 * patches * _RGB * model.patch_size**2 * vision.width
    return embedding + kept * _blocks(vision, patches + 1, vision.ffn, vision.mlp_ratio)


def text_flops(model: ResolvedModel) -> float:
    """Count a forward of the text tower and its projection on one caption, over the whole context length."""
    text = model.text
    projection = 2 * text.width**2 if text.projection == "linear" else 0
    return _blocks(text, text.context_length, "mlp", text.mlp_ratio) + projection


def decoder_flops(model: ResolvedModel, size: int) -> float:
    """Count a forward of the pixel decoder to one image of ``size`` pixels."""
    decoder, patches = model.decoder, patches_of(model, size)
    ends = 2 * patches * decoder.width * (model.bottleneck + _RGB * model.patch_size**2)
    return ends + _blocks(decoder, patches, decoder.ffn, DECODER_MLP_RATIO)


def dino_head_flops(head: DinoHeadConfig, in_dim: int) -> float:
    """Count a forward of the DINO head on one row, with the logits of all prototypes."""
    return float(2 * sum(a * b for a, b in pairwise(head_widths(in_dim, head))))


def perceptual_flops(kind: str, size: int) -> float:
    """Count a forward of the LPIPS backbone on one image of ``size`` pixels; its heads are negligible."""
    if kind == "none":
        return 0.0
    total, side = 0, size
    for conv in NETS[PERCEPTUAL_NETS[kind]]:
        if conv.pool:
            side = (side - conv.pool) // 2 + 1
        side = (side + 2 * conv.padding - conv.kernel) // conv.stride + 1
        total += 2 * conv.inputs * conv.outputs * conv.kernel**2 * side**2
    return float(total)


def flops_per_step(config: ResolvedConfig) -> dict[str, float]:
    """Count one optimizer step over all devices: each objective (0 if it is off), and their ``total``.

    The number of masked patches is its expectation.
    """
    per_image = {
        "contrastive": _contrastive, "self_distillation": _self_distillation, "reconstruction": _reconstruction,
    }
    shares = share(config, 1).passes
    step = {name: shares[name].batch * count(config) if name in shares else 0.0 for name, count in per_image.items()}
    return {**step, "total": sum(step.values())}


def _contrastive(config: ResolvedConfig) -> float:
    """Count one pair. The logits, B columns each, are below a thousandth of it and are left out."""
    model, kept = config.model, 1 - config.objectives.contrastive.drop_path
    size = sizes.contrastive_size(config)
    features = patches_of(model, size) if model.vision.clip_feature == "pooled" else 1
    projections = features * _bottleneck_if_shared(model) + 2 * sizes.feature_width(model) * model.text.width
    return 3 * (vision_flops(model, size, kept) + projections + text_flops(model))


def _self_distillation(config: ResolvedConfig) -> float:
    """Count one image: student (3 forwards) on global and local crops, teacher (1) on global crops, both heads."""
    model, augment, settings = config.model, config.data.augment, config.objectives.self_distillation
    kept, masked = 1 - settings.drop_path, expected_masked_patches(config)
    student = GLOBAL_CROPS * vision_flops(model, augment.global_size, kept)
    student += augment.local_crops * vision_flops(model, augment.local_size, kept)
    teacher = GLOBAL_CROPS * vision_flops(model, augment.global_size)
    row = _bottleneck_if_shared(model) + dino_head_flops(model.dino_head, sizes.feature_width(model))
    student_rows = GLOBAL_CROPS + augment.local_crops + masked
    return 3 * (student + student_rows * row) + teacher + (GLOBAL_CROPS + masked) * row


def _reconstruction(config: ResolvedConfig) -> float:
    """Count one image. The frozen LPIPS network sees two images and passes one gradient on, which is 3 forwards. A
    frozen encoder has its forward alone."""
    model, settings = config.model, config.objectives.reconstruction
    size = model.image_size
    encoder = vision_flops(model, size, 1 - settings.drop_path)
    encoder += 2 * patches_of(model, size) * model.vision.width * model.bottleneck
    encoder *= 1 if settings.frozen_encoder else 3
    decoder = 3 * (decoder_flops(model, size) + perceptual_flops(settings.perceptual, size))
    return encoder + decoder + adversarial_flops(config)


def adversarial_flops(config: ResolvedConfig) -> float:
    """Count what the discriminator adds for an image once both sides learn; a timm ViT's own cost is not known here.

    The features see the decoded image with a gradient (2 forwards) and, for the discriminator, both images without one;
    the heads pass a gradient on for the decoder (2) and learn from both images (3 each).
    """
    settings, model = config.objectives.adversarial, config.model
    if settings.weight == 0 or settings.features != "own":
        return 0.0
    size, width = settings.features_size or model.image_size, model.vision.width
    heads = len(own_widths(model))
    head = 2 * patches_of(model, size) * width * width * (1 + TOKENS_SEEN)
    return 4 * vision_flops(model, size) + 8 * heads * head


def expected_masked_patches(config: ResolvedConfig) -> float:
    """Return the expected number of masked patches in an image's global crops."""
    settings = config.objectives.self_distillation
    if settings.ibot_weight == 0:
        return 0.0
    share = settings.mask_probability * sum(settings.mask_ratio) / 2
    return GLOBAL_CROPS * share * patches_of(config.model, config.data.augment.global_size)


def _bottleneck_if_shared(model: ResolvedModel) -> float:
    return 0.0 if model.bottleneck_reconstruction_only else 2.0 * model.vision.width * model.bottleneck
