"""``config.json`` of the official VTP folder, to and from ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from megavtp.config.sizes import VISION, ResolvedDecoder, ResolvedModel, ResolvedText, ResolvedVision
from megavtp.errors import UserError
from megavtp.models.vtp import OBJECTIVES

# What transformers writes around the model's own keys.
FRAME = {"architectures": ["VTPModel"], "dtype": "float32", "model_type": "vtp", "transformers_version": "4.56.2"}

NORM_NAMES = ("rmsnorm", "layernorm", "layernormbf16")
FFN_NAMES = ("swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp")

# Official key: (default of the official class, admitted type or values). Every key the class writes is here.
KEYS: dict[str, tuple[Any, Any]] = {
    "image_size": (256, int), "train_clip": (True, bool), "train_reconstruction": (True, bool),
    "vision_patch_size": (16, int), "vision_embed_dim": (768, int), "vision_depth": (12, int),
    "vision_num_heads": (12, int), "vision_mlp_ratio": (4.0, float), "vision_ffn_layer": ("swiglu", FFN_NAMES),
    "vision_norm_layer": ("rmsnorm", NORM_NAMES), "vision_init_values": (None, float),
    "vision_use_qk_norm": (False, bool), "vision_feature_bottleneck": (64, int),
    "vision_bottleneck_ae_only": (True, bool), "vision_clip_feat": ("cls", ("cls", "pooled")),
    "text_context_length": (77, int), "text_vocab_size": (49408, int), "text_embed_dim": (768, int),
    "text_num_heads": (12, int), "text_depth": (12, int), "text_mlp_ratio": (4.0, float),
    "text_ls_init_value": (None, float), "text_embed_cls": (False, bool), "text_pad_id": (0, int),
    "text_no_causal_mask": (False, bool), "text_pool_type": ("argmax", ("argmax", "first", "last")),
    "text_proj_type": ("linear", ("linear", "none")), "text_proj_bias": (False, bool),
    "text_output_tokens": (False, bool), "text_quick_gelu": (False, bool), "decoder_embed_dim": (768, int),
    "decoder_num_heads": (12, int), "decoder_depth": (12, int), "decoder_ffn_layer": ("swiglu", FFN_NAMES),
    "decoder_norm_layer": ("layernorm", NORM_NAMES), "decoder_init_values": (None, float),
    "decoder_use_qk_norm": (False, bool), "init_logit_scale": (None, float), "init_logit_bias": (None, float),
    "nonscalar_logit_scale": (False, bool),
}
OPTIONAL = {key for key, (default, _) in KEYS.items() if default is None}
POSITIVE = {key for key, (_, kind) in KEYS.items() if kind is int} - {"text_pad_id"}


def _checked(key: str, value: Any) -> Any:
    kind = KEYS[key][1]
    if value is None and key in OPTIONAL:
        return None
    if isinstance(kind, tuple):
        if value in kind:
            return value
        raise UserError(f"config.json: {key} is {value!r}, which is not one of {', '.join(kind)}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if type(value) is not kind or (key in POSITIVE and value < 1):
        wanted = f"a positive {kind.__name__}" if key in POSITIVE else f"a {kind.__name__}"
        raise UserError(f"config.json: {key} is {value!r}; it must be {wanted}")
    return value


def read_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Every official key with its value or default, checked. UserError for another model's config."""
    if data.get("model_type") != "vtp":
        raise UserError(f"config.json is of model_type {data.get('model_type')!r}, not 'vtp'; give a VTP folder")
    values = {key: _checked(key, data.get(key, default)) for key, (default, _) in KEYS.items()}
    if values["text_embed_cls"]:
        raise UserError("config.json: text_embed_cls=true is not supported (broken in the official code as well)")
    if values["train_reconstruction"] and values["vision_patch_size"] != 16:
        raise UserError(
            f"config.json: vision_patch_size is {values['vision_patch_size']}, but the official decoder always "
            "enlarges by 16; only 16 is supported with train_reconstruction"
        )
    return values


def config_from_official(data: Mapping[str, Any]) -> ResolvedModel:
    """The model config of an official ``config.json``, all sizes explicit. UserError names a bad value."""
    v = read_keys(data)
    sizes = {shape: name for name, shape in VISION.items()}
    shape = (v["vision_embed_dim"], v["vision_depth"], v["vision_num_heads"])
    return ResolvedModel(
        size=sizes.get(shape, "b"), image_size=v["image_size"], patch_size=v["vision_patch_size"],
        bottleneck=v["vision_feature_bottleneck"], bottleneck_reconstruction_only=v["vision_bottleneck_ae_only"],
        init_logit_scale=v["init_logit_scale"] or None, init_logit_bias=v["init_logit_bias"],
        vision=ResolvedVision(
            width=shape[0], depth=shape[1], heads=shape[2], mlp_ratio=v["vision_mlp_ratio"],
            ffn=v["vision_ffn_layer"], norm=v["vision_norm_layer"], layer_scale=v["vision_init_values"] or None,
            qk_norm=v["vision_use_qk_norm"], clip_feature=v["vision_clip_feat"],
        ),
        text=ResolvedText(
            width=v["text_embed_dim"], depth=v["text_depth"], heads=v["text_num_heads"], mlp_ratio=v["text_mlp_ratio"],
            context_length=v["text_context_length"], vocab_size=v["text_vocab_size"],
            layer_scale=v["text_ls_init_value"], causal=not v["text_no_causal_mask"], pool=v["text_pool_type"],
            projection=v["text_proj_type"], projection_bias=v["text_proj_bias"], quick_gelu=v["text_quick_gelu"],
        ),
        decoder=ResolvedDecoder(
            width=v["decoder_embed_dim"], depth=v["decoder_depth"], heads=v["decoder_num_heads"],
            ffn=v["decoder_ffn_layer"], norm=v["decoder_norm_layer"], layer_scale=v["decoder_init_values"] or None,
            qk_norm=v["decoder_use_qk_norm"],
        ),
    )


def config_to_official(config: ResolvedModel, objectives: AbstractSet[str] = OBJECTIVES) -> dict[str, Any]:
    """The official ``config.json`` of a resolved config; UserError for what that format cannot say."""
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
        **{key: default for key, (default, _) in KEYS.items()}, **FRAME,
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
