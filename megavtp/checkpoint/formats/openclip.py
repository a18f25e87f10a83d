"""Weights of OpenCLIP models can fill the text encoder and, where the shapes fit, the image encoder.

The weights do not show the number of heads or QuickGELU: set ``model.text.heads`` (OpenCLIP: width / 64) and, for
OpenAI's models, ``model.text.quick_gelu=true``.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from megavtp.checkpoint.formats.foreign import ForeignWeights
from megavtp.checkpoint.formats.hf_vtp import SCALARS, TEXT_BLOCK, official_name
from megavtp.checkpoint.formats.timm_vit import from_timm, other_rotation
from megavtp.config.sizes import ResolvedModel
from megavtp.models.fitting import Shapes, misfits

_TEXT = re.compile(r"(transformer|token_embedding|ln_final|text_projection)(\..*)?|positional_embedding")


def is_openclip(names: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("visual.") for name in names) and _plain_text(names).keys() >= {"token_embedding.weight"}


def from_openclip(state: Mapping[str, Tensor], config: ResolvedModel, shapes: Shapes) -> ForeignWeights:
    """Return tensors by our names for the towers of a model with ``shapes``.

    The text encoder must fit, which the caller checks; the image encoder is used as a whole or not at all.
    """
    found = ForeignWeights()
    _text(_plain_text({n: t for n, t in state.items() if not n.startswith("visual.")}), config, shapes, found)
    _visual({n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}, shapes, found)
    return found


def _plain_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the text tower as OpenCLIP's class CLIP does; its newer class puts ``text.`` before the names."""
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def _text(state: Mapping[str, Tensor], config: ResolvedModel, shapes: Shapes, found: ForeignWeights) -> None:
    theirs = {
        official_name(name, config).replace("text_transformer.", "transformer."): name
        for name in shapes if name.startswith("text.")
    }
    for name, tensor in state.items():
        if name in SCALARS and name in shapes and tensor.numel() == 1:
            found.tensors[name] = tensor.reshape(1)
        elif name in SCALARS:
            found.left_out[name] = "this model has no such parameter"
        elif name == "attn_mask":
            found.left_out[name] = "the causal mask is not stored here"
        elif name in theirs:
            found.tensors[theirs[name]] = _turned(tensor) if name == "text_projection" else tensor
        elif _TEXT.fullmatch(name) and not theirs:
            found.left_out[name] = "the contrastive objective is off"
        else:
            found.unknown.append(name)
    projection = "text.projection.weight"
    shape = list(found.tensors[projection].shape) if projection in found.tensors else []
    if len(shape) == 2 and shape[1] == shapes[projection][1] and shape[0] != shapes[projection][0]:
        del found.tensors[projection]
        found.fresh |= {projection, "text.projection.bias"}
        found.left_out["text_projection"] = "the image features here have the text encoder's width, there another"


def _turned(matrix: Tensor) -> Tensor:
    """Transpose a matrix that is stored for x @ P; anything else stays as it is, and will not fit."""
    return matrix.t() if matrix.ndim == 2 else matrix


def _visual(state: Mapping[str, Tensor], shapes: Shapes, found: ForeignWeights) -> None:
    faults = []
    if theirs := {n.removeprefix("trunk."): t for n, t in state.items() if n.startswith("trunk.")}:
        faults += [why] if (why := other_rotation(theirs)) else []
        trunk = from_timm(theirs)
        trunk.left_out = {f"trunk.{name}": reason for name, reason in trunk.left_out.items()}
        trunk.left_out |= {n: "projection of the file" for n in state if n.startswith("head.")}
    else:
        trunk = _vit(state, shapes)
    required = [name for name in shapes if name.startswith("trunk.") and name not in trunk.fresh]
    faults += misfits(trunk.tensors, shapes, required) + [f"unknown visual.{name}" for name in trunk.unknown]
    if faults:
        found.left_out["visual.*"] = "the image encoder does not fit: " + "; ".join(faults)
        return
    found.tensors |= trunk.tensors
    found.fresh |= trunk.fresh
    found.left_out |= {f"visual.{name}": reason for name, reason in trunk.left_out.items()}


def _vit(state: Mapping[str, Tensor], shapes: Shapes) -> ForeignWeights:
    """Read OpenCLIP's own ViT. Its patch embedding has no bias, so ours is zero."""
    trunk = ForeignWeights(fresh={"trunk.mask_token", "trunk.feature_bottleneck.weight"})
    for name, tensor in state.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if block:
            own = block[2]
            for ours, theirs in TEXT_BLOCK.items():
                own = ours + own.removeprefix(theirs) if own.startswith(theirs) else own
            trunk.tensors[f"trunk.blocks.{block[1]}.{own}"] = tensor
        elif name == "conv1.weight":
            trunk.tensors["trunk.patch_embed.proj.weight"] = tensor
            trunk.tensors["trunk.patch_embed.proj.bias"] = tensor.new_zeros(tensor.shape[:1])
        elif name == "class_embedding":
            trunk.tensors["trunk.cls_token"] = tensor.reshape(1, 1, -1)
        elif name.startswith("ln_post."):
            trunk.tensors[f"trunk.norm.{name.removeprefix('ln_post.')}"] = tensor
        elif name == "proj" and list(_turned(tensor).shape) == list(shapes.get("visual_proj.weight", ())):
            trunk.tensors["visual_proj.weight"] = _turned(tensor)
        elif name == "proj":
            trunk.left_out[name] = "the image features here have the text encoder's width, there another"
        elif name == "positional_embedding":
            trunk.left_out[name] = "this encoder's positions are rotary only"
        elif name.startswith("ln_pre."):
            trunk.left_out[name] = "this encoder has no norm before its blocks"
        else:
            trunk.unknown.append(name)
    return trunk
