"""This translates ``config.json`` of the official VTP folder to ``ModelConfig`` and back."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any, Literal

from megavtp.config.schema import DecoderConfig, ModelConfig, TextConfig, VisionConfig
from megavtp.config.sizes import VISION, ResolvedModel
from megavtp.config.validate import check_model
from megavtp.errors import UserError
from megavtp.json_file import Finite, Positive, check_form, foreign_form
from megavtp.models.vtp import OBJECTIVES

# The library transformers writes these keys around the model's own.
FRAME = {"architectures": ["VTPModel"], "dtype": "float32", "model_type": "vtp", "transformers_version": "4.56.2"}

_Norm = Literal["rmsnorm", "layernorm", "layernormbf16"]
_Ffn = Literal["swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp"]


@foreign_form
class OfficialConfig:
    """Every key that the official class writes, with its default."""

    image_size: Positive = 256
    train_clip: bool = True
    train_reconstruction: bool = True
    vision_patch_size: Positive = 16
    vision_embed_dim: Positive = 768
    vision_depth: Positive = 12
    vision_num_heads: Positive = 12
    vision_mlp_ratio: Finite = 4.0
    vision_ffn_layer: _Ffn = "swiglu"
    vision_norm_layer: _Norm = "rmsnorm"
    vision_init_values: Finite | None = None
    vision_use_qk_norm: bool = False
    vision_feature_bottleneck: Positive = 64
    vision_bottleneck_ae_only: bool = True
    vision_clip_feat: Literal["cls", "pooled"] = "cls"
    text_context_length: Positive = 77
    text_vocab_size: Positive = 49408
    text_embed_dim: Positive = 768
    text_num_heads: Positive = 12
    text_depth: Positive = 12
    text_mlp_ratio: Finite = 4.0
    text_ls_init_value: Finite | None = None
    text_embed_cls: bool = False
    text_pad_id: int = 0
    text_no_causal_mask: bool = False
    text_pool_type: Literal["argmax", "first", "last"] = "argmax"
    text_proj_type: Literal["linear", "none"] = "linear"
    text_proj_bias: bool = False
    text_output_tokens: bool = False
    text_quick_gelu: bool = False
    decoder_embed_dim: Positive = 768
    decoder_num_heads: Positive = 12
    decoder_depth: Positive = 12
    decoder_ffn_layer: _Ffn = "swiglu"
    decoder_norm_layer: _Norm = "layernorm"
    decoder_init_values: Finite | None = None
    decoder_use_qk_norm: bool = False
    init_logit_scale: Finite | None = None
    init_logit_bias: Finite | None = None
    nonscalar_logit_scale: bool = False


def read_keys(data: Mapping[str, Any], where: str = "config.json") -> OfficialConfig:
    """Return every official key with its value or default, checked. UserError for another model's config."""
    if data.get("model_type") != "vtp":
        raise UserError(f"{where} is of model_type {data.get('model_type')!r}, not 'vtp'; give a VTP folder")
    values = check_form(data, OfficialConfig, where, "download it again")
    if values.text_embed_cls:
        raise UserError(f"{where}: text_embed_cls=true is not supported (broken in the official code as well)")
    if values.train_reconstruction and values.vision_patch_size != 16:
        raise UserError(
            f"{where}: vision_patch_size is {values.vision_patch_size}, but the official decoder always enlarges by "
            "16; only 16 is supported with train_reconstruction"
        )
    return values


def config_from_official(data: Mapping[str, Any], where: str = "config.json") -> ResolvedModel:
    """Return the model config of an official ``config.json``, with all sizes filled. UserError names a bad value."""
    v = read_keys(data, where)
    sizes = {shape: name for name, shape in VISION.items()}
    shape = (v.vision_embed_dim, v.vision_depth, v.vision_num_heads)
    model = ModelConfig(
        size=sizes.get(shape, "b"), image_size=v.image_size, patch_size=v.vision_patch_size,
        bottleneck=v.vision_feature_bottleneck, bottleneck_reconstruction_only=v.vision_bottleneck_ae_only,
        init_logit_scale=v.init_logit_scale or None, init_logit_bias=v.init_logit_bias,
        vision=VisionConfig(
            width=shape[0], depth=shape[1], heads=shape[2], mlp_ratio=v.vision_mlp_ratio, ffn=v.vision_ffn_layer,
            norm=v.vision_norm_layer, layer_scale=v.vision_init_values or None, qk_norm=v.vision_use_qk_norm,
            clip_feature=v.vision_clip_feat,
        ),
        text=TextConfig(
            width=v.text_embed_dim, depth=v.text_depth, heads=v.text_num_heads, mlp_ratio=v.text_mlp_ratio,
            context_length=v.text_context_length, vocab_size=v.text_vocab_size, layer_scale=v.text_ls_init_value,
            causal=not v.text_no_causal_mask, pool=v.text_pool_type, projection=v.text_proj_type,
            projection_bias=v.text_proj_bias, quick_gelu=v.text_quick_gelu,
        ),
        decoder=DecoderConfig(
            width=v.decoder_embed_dim, depth=v.decoder_depth, heads=v.decoder_num_heads, ffn=v.decoder_ffn_layer,
            norm=v.decoder_norm_layer, layer_scale=v.decoder_init_values or None, qk_norm=v.decoder_use_qk_norm,
        ),
    )
    try:
        return check_model(model)
    except UserError as error:
        raise UserError(f"{where} is of no model: {error}; download it again") from None


def config_to_official(config: ResolvedModel, objectives: AbstractSet[str] = OBJECTIVES) -> dict[str, Any]:
    """Return the official ``config.json`` of a resolved config; UserError for what that format cannot express."""
    if config.rope_dtype != "bfloat16":
        raise UserError(
            f"model.rope_dtype={config.rope_dtype} has no official counterpart: the official model would round to "
            "bfloat16 and give other numbers; only models trained with model.rope_dtype=bfloat16 can be exported"
        )
    if "reconstruction" in objectives and config.patch_size != 16:
        raise UserError(
            f"model.patch_size={config.patch_size} has no official counterpart: the official decoder always enlarges "
            "by 16; only 16 can be exported"
        )
    vision, text, decoder = config.vision, config.text, config.decoder
    return dict(sorted({
        **asdict(OfficialConfig()), **FRAME,
        "image_size": config.image_size, "train_clip": "contrastive" in objectives,
        "train_reconstruction": "reconstruction" in objectives, "vision_patch_size": config.patch_size,
        "vision_embed_dim": vision.width, "vision_depth": vision.depth, "vision_num_heads": vision.heads,
        "vision_mlp_ratio": vision.mlp_ratio, "vision_ffn_layer": vision.ffn, "vision_norm_layer": vision.norm,
        "vision_init_values": vision.layer_scale, "vision_use_qk_norm": vision.qk_norm,
        "vision_feature_bottleneck": config.bottleneck,
        "vision_bottleneck_ae_only": config.bottleneck_reconstruction_only, "vision_clip_feat": vision.clip_feature,
        "text_context_length": text.context_length, "text_vocab_size": text.vocab_size, "text_embed_dim": text.width,
        "text_num_heads": text.heads, "text_depth": text.depth, "text_mlp_ratio": text.mlp_ratio,
        "text_ls_init_value": text.layer_scale, "text_no_causal_mask": not text.causal, "text_pool_type": text.pool,
        "text_proj_type": text.projection, "text_proj_bias": text.projection_bias, "text_quick_gelu": text.quick_gelu,
        "decoder_embed_dim": decoder.width, "decoder_num_heads": decoder.heads, "decoder_depth": decoder.depth,
        "decoder_ffn_layer": decoder.ffn, "decoder_norm_layer": decoder.norm,
        "decoder_init_values": decoder.layer_scale, "decoder_use_qk_norm": decoder.qk_norm,
        "init_logit_scale": config.init_logit_scale, "init_logit_bias": config.init_logit_bias,
    }.items()))
