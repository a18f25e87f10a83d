"""The trunk beside timm's ViT of DINOv3: the same function of the same weights, forward and backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import Pair, Setting
from benchmarks.side_by_side import difference
from megavtp.checkpoint.formats.initial import fill
from megavtp.checkpoint.formats.timm_vit import from_timm
from megavtp.config.load import from_dict
from megavtp.config.schema import ModelConfig
from megavtp.config.sizes import Shape, resolve_model
from megavtp.models.build import build_vtp

PATCH = 16


def dinov3(shape: Shape, image: int) -> nn.Module:
    """Make timm's ViT as it sets up DINOv3, without register tokens, which MegaVTP's trunk has not."""
    from timm.models.eva import Eva

    width, depth, heads = shape
    return Eva(
        img_size=image, patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads, num_classes=0, init_values=1.0,
        global_pool="token", rope_type="dinov3", rope_temperature=100, rope_rotate_half=True, use_rot_pos_emb=True,
        use_abs_pos_emb=False, use_fc_norm=False, dynamic_img_size=True, num_reg_tokens=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )


def model_like_dinov3(shape: Shape, image: int, layer_scale: float | None = 1.0) -> dict[str, Any]:
    """Return the settings with which our trunk is the same function."""
    vision = dict(zip(("width", "depth", "heads"), shape), layer_scale=layer_scale, ffn="mlp", norm="layernormbf16")
    return {"image_size": image, "patch_size": PATCH, "rope_dtype": "float32", "vision": vision}


@contextmanager
def trunk(setting: Setting) -> Iterator[Pair]:
    shape = setting.size((32, 2, 2), (384, 12, 6), (1024, 24, 16))
    image, batch = setting.size((32, 2), (224, 4), (256, 64))
    theirs = dinov3(shape, image).to(setting.device)
    config = resolve_model(from_dict(model_like_dinov3(shape, image), ModelConfig))
    ours = build_vtp(config, objectives=frozenset(), device=setting.device, compute_dtype=setting.dtype)
    fill(ours, from_timm(theirs.state_dict()).tensors)
    images = torch.randn(batch, 3, image, image, device=setting.device)

    def our_tokens(x: Tensor) -> Tensor:
        with ours.precision():
            (tokens,) = ours.trunk([x])
        return tokens

    def their_tokens(x: Tensor) -> Tensor:
        with setting.autocast():
            return theirs.forward_features(x)

    factor = torch.randn_like(our_tokens(images))
    trained = [p for name, p in ours.trunk.named_parameters() if "bottleneck" not in name and name != "mask_token"]
    pixels = images.clone().requires_grad_()
    results = [_both_ways(tokens, pixels, [pixels], factor) for tokens in (our_tokens, their_tokens)]
    yield Pair(
        f"ViT {shape[0]} x {shape[1]}, {batch} images of {image} pixels, forward and backward",
        lambda: _both_ways(our_tokens, images, trained, factor),
        lambda: _both_ways(their_tokens, images, list(theirs.parameters()), factor),
        difference(*results),
    )


def _both_ways(
    tokens: Callable[[Tensor], Tensor], images: Tensor, wanted: list[Tensor], factor: Tensor
) -> list[Tensor]:
    """Return tokens and gradients of a sum of them."""
    out = tokens(images)
    return [out.detach(), *torch.autograd.grad(out, wanted, factor.to(out.dtype))]
