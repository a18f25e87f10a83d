"""This translates ``config.json`` of the official VTP folder to ``ModelConfig`` and back."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_origin, get_type_hints

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
    """Every key that the official class writes, with its default and, if we have one, our setting of that meaning."""

    image_size: Annotated[Positive, "model.image_size"] = 256
    train_clip: bool = True
    train_reconstruction: bool = True
    vision_patch_size: Annotated[Positive, "model.patch_size"] = 16
    vision_embed_dim: Annotated[Positive, "vision.width"] = 768
    vision_depth: Annotated[Positive, "vision.depth"] = 12
    vision_num_heads: Annotated[Positive, "vision.heads"] = 12
    vision_mlp_ratio: Annotated[Finite, "vision.mlp_ratio"] = 4.0
    vision_ffn_layer: Annotated[_Ffn, "vision.ffn"] = "swiglu"
    vision_norm_layer: Annotated[_Norm, "vision.norm"] = "rmsnorm"
    vision_init_values: Annotated[Finite | None, "vision.layer_scale"] = None
    vision_use_qk_norm: Annotated[bool, "vision.qk_norm"] = False
    vision_feature_bottleneck: Annotated[Positive, "model.bottleneck"] = 64
    vision_bottleneck_ae_only: Annotated[bool, "model.bottleneck_reconstruction_only"] = True
    vision_clip_feat: Annotated[Literal["cls", "pooled"], "vision.clip_feature"] = "cls"
    text_context_length: Annotated[Positive, "text.context_length"] = 77
    text_vocab_size: Annotated[Positive, "text.vocab_size"] = 49408
    text_embed_dim: Annotated[Positive, "text.width"] = 768
    text_num_heads: Annotated[Positive, "text.heads"] = 12
    text_depth: Annotated[Positive, "text.depth"] = 12
    text_mlp_ratio: Annotated[Finite, "text.mlp_ratio"] = 4.0
    text_ls_init_value: Annotated[Finite | None, "text.layer_scale"] = None
    text_embed_cls: bool = False
    text_pad_id: int = 0
    text_no_causal_mask: bool = False
    text_pool_type: Annotated[Literal["argmax", "first", "last"], "text.pool"] = "argmax"
    text_proj_type: Annotated[Literal["linear", "none"], "text.projection"] = "linear"
    text_proj_bias: Annotated[bool, "text.projection_bias"] = False
    text_output_tokens: bool = False
    text_quick_gelu: Annotated[bool, "text.quick_gelu"] = False
    decoder_embed_dim: Annotated[Positive, "decoder.width"] = 768
    decoder_num_heads: Annotated[Positive, "decoder.heads"] = 12
    decoder_depth: Annotated[Positive, "decoder.depth"] = 12
    decoder_ffn_layer: Annotated[_Ffn, "decoder.ffn"] = "swiglu"
    decoder_norm_layer: Annotated[_Norm, "decoder.norm"] = "layernorm"
    decoder_init_values: Annotated[Finite | None, "decoder.layer_scale"] = None
    decoder_use_qk_norm: Annotated[bool, "decoder.qk_norm"] = False
    init_logit_scale: Annotated[Finite | None, "model.init_logit_scale"] = None
    init_logit_bias: Annotated[Finite | None, "model.init_logit_bias"] = None
    nonscalar_logit_scale: bool = False


# Section and name of our setting, by official key. Our text.causal is the opposite of text_no_causal_mask.
_OURS = {
    key: kind.__metadata__[-1].split(".") for key, kind in get_type_hints(OfficialConfig, include_extras=True).items()
    if get_origin(kind) is Annotated and isinstance(kind.__metadata__[-1], str)
}


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
    values = asdict(read_keys(data, where))
    given: dict[str, dict[str, Any]] = {"model": {}, "vision": {}, "text": {}, "decoder": {}}
    for key, (section, ours) in _OURS.items():
        given[section][ours] = values[key]
    for section, ours in (("model", "init_logit_scale"), ("vision", "layer_scale"), ("decoder", "layer_scale")):
        given[section][ours] = given[section][ours] or None
    vision = VisionConfig(**given["vision"])
    shape = (vision.width, vision.depth, vision.heads)
    model = ModelConfig(
        size=next((size for size, known in VISION.items() if known == shape), "b"), **given["model"], vision=vision,
        text=TextConfig(**given["text"], causal=not values["text_no_causal_mask"]),
        decoder=DecoderConfig(**given["decoder"]),
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
    sections = {"model": config, "vision": config.vision, "text": config.text, "decoder": config.decoder}
    values = {key: getattr(sections[section], ours) for key, (section, ours) in _OURS.items()}
    return dict(sorted({
        **asdict(OfficialConfig()), **FRAME, **values, "text_no_causal_mask": not config.text.causal,
        "train_clip": "contrastive" in objectives, "train_reconstruction": "reconstruction" in objectives,
    }.items()))
