"""Weights of timm's ViTs can fill the image encoder: ``Eva`` (DINOv3), ``VisionTransformer`` (DINOv2, supervised).

The blocks compute the same where the settings agree: ``model.vision.norm`` layernormbf16 (timm's 1e-5) or
layernorm (1e-6), ``ffn`` mlp or swiglu with the ``mlp_ratio`` that gives the file's hidden width, ``layer_scale`` set
when the file has one, and ``model.rope_dtype=float32``: bfloat16 rounds queries and keys.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megavtp.checkpoint.formats.foreign import ForeignWeights

_NO_PLACE = {
    r"pos_embed": "this encoder's positions are rotary only",
    r"(reg|storage)_tokens?|dist_token": "this encoder has no register tokens",
    r"(head|head_drop|head_dist|fc_norm|attn_pool)\..*": "classifier and pooling of the file",
    r"norm_pre\..*": "this encoder has no norm before its blocks",
    r"rope(_embed)?\..*": "the rotary table follows from the config",
}
_SAME = re.compile(
    r"cls_token|mask_token|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|"
    r"blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|attn\.[qk]_norm\.weight|"
    r"ls[12]\.gamma|mlp\.(fc[12]|w[123])\.(weight|bias))"
)
_PART = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
_GATED = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"}


def is_timm_vit(names: Mapping[str, Tensor]) -> bool:
    return "patch_embed.proj.weight" in names and "blocks.0.attn.proj.weight" in names


def other_rotation(names: Mapping[str, Tensor]) -> str | None:
    """Name the model if its blocks fit but rotate queries and keys by another rule than our encoder; else None."""
    own = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    first, last = (names.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    gated = "mlp.fc1_g.weight" in own or _is_packed(first, last)
    if gated and "pos_embed" in names and own & {"attn.q_bias", "attn.q_proj.weight"}:
        return "an EVA-02, whose rotary positions are others than this encoder's"
    if "rope.freqs" in names or own >= {"gamma_1", "attn.qkv.bias"}:
        return "a RoPE-ViT, whose rotary positions are others than this encoder's"
    return None


def from_timm(state: Mapping[str, Tensor]) -> ForeignWeights:
    found = ForeignWeights(fresh={"trunk.mask_token", "trunk.feature_bottleneck.weight"})
    ours: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        reason = next((why for pattern, why in _NO_PLACE.items() if re.fullmatch(pattern, name)), None)
        block = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
        if reason:
            found.left_out[name] = reason
        elif block:
            blocks.setdefault(block[1], {})[block[2]] = tensor
        else:
            ours[name] = tensor
    for prefix, own in blocks.items():
        ours |= {f"{prefix}.{name}": tensor for name, tensor in _feed_forward(_attention(own)).items()}
    for name, tensor in ours.items():
        if _SAME.fullmatch(name):
            found.tensors[f"trunk.{name}"] = tensor
        else:
            found.unknown.append(name)
    if "norm.weight" not in state:  # a model that averages its tokens applies its norm after that
        found.fresh |= {"trunk.norm.weight", "trunk.norm.bias"}
    return found


def _attention(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fuse a block's projections into one with a bias. Where there is none it is zero, which gives the same attention.

    The layer scales get our names; tensors that are not known keep their own.
    """
    own = {_PART.get(name, name): tensor for name, tensor in own.items()}
    _join(own, "attn.qkv.weight", [f"attn.{part}_proj.weight" for part in "qkv"])
    weight = own.get("attn.qkv.weight")
    if weight is not None and weight.ndim == 2 and "attn.qkv.bias" not in own:
        zeros = weight.new_zeros(len(weight) // 3)
        for part in "qkv":
            name = next((n for n in (f"attn.{part}_bias", f"attn.{part}_proj.bias") if n in own), None)
            own[f"attn.{part}_bias"] = zeros if name is None else own.pop(name)
        _join(own, "attn.qkv.bias", [f"attn.{part}_bias" for part in "qkv"])
    return own


def _join(own: dict[str, Tensor], name: str, parts: Sequence[str]) -> None:
    """Concatenate ``parts`` as ``name``; parts that do not fit together stay, and count as unknown."""
    tensors = [own[part] for part in parts if part in own]
    if len(tensors) == len(parts) and len({(t.dtype, t.shape[1:], t.ndim) for t in tensors}) == 1 and tensors[0].ndim:
        own[name] = torch.cat(tensors)
        for part in parts:
            del own[part]


def _is_packed(first: Tensor | None, last: Tensor | None) -> bool:
    """Tell whether the first linear of a feed-forward network gives both gate and value."""
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        return False
    return len(first) == 2 * last.shape[1]


def _feed_forward(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's gated networks to w1 (gate), w2, w3; a plain one stays as it is."""
    if _is_packed(own.get("mlp.fc1.weight"), own.get("mlp.fc2.weight")):
        rows = len(own["mlp.fc1.weight"])
        for kind in ("weight", "bias"):
            whole = own.get(f"mlp.fc1.{kind}")
            if whole is not None and whole.shape[:1] == (rows,):
                own[f"mlp.fc1_g.{kind}"], own[f"mlp.fc1_x.{kind}"] = own.pop(f"mlp.fc1.{kind}").chunk(2)
    if "mlp.fc1_g.weight" not in own:
        return own
    return {re.sub(r"^mlp\.(fc1_g|fc1_x|fc2)\.", lambda m: f"mlp.{_GATED[m[1]]}.", name): t for name, t in own.items()}
