"""Stored inputs and outputs of the official VTP code (CPU, float32), and a plain re-statement of its towers.

RoPE rounds queries and keys to bfloat16, so a difference of 1e-7 in a matrix product (another CPU, another BLAS) may
flip one rounding and show as 1e-4 further on. Hence two checks: the plain towers, which use the same products, must
agree to 1e-5 everywhere; the stored outputs to 1e-5 on average and to 1e-3 where a rounding has flipped, while a
rotation in float32 would be off by 1e-3 on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megavtp.config.schema import DecoderConfig, DinoHeadConfig, ModelConfig, TextConfig, VisionConfig
from megavtp.config.sizes import resolve_model

DATA = Path(__file__).parent / "data" / "vtp"

TINY = resolve_model(ModelConfig(
    image_size=64, bottleneck=16,
    vision=VisionConfig(width=128, depth=3, heads=2),
    text=TextConfig(width=64, depth=2, heads=4, context_length=16, vocab_size=512),
    decoder=DecoderConfig(width=128, depth=2, heads=2),
    dino_head=DinoHeadConfig(prototypes=96, hidden=48, bottleneck=24),
))


def stored(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def assert_matches_oracle(x: Tensor, expected: Tensor) -> None:
    """To 1e-4 on average and 1e-3 at most, of the largest value.

    The released models rotate queries and keys in bfloat16: where a CPU of another make rounds the last bit of a
    product otherwise, single ones of them differ by parts in a thousand.
    """
    assert x.shape == expected.shape
    difference = (x.float() - expected.float()).abs() / expected.abs().max().float()
    assert difference.mean() < 1e-4, difference.mean()
    assert difference.max() < 1e-3, difference.max()


def assert_equals(x: Tensor, expected: Tensor) -> None:
    """To 1e-5 everywhere."""
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def plain_rope(q: Tensor, periods: Tensor, rows: int, columns: int, prefix: int) -> Tensor:
    """Rotate (b, heads, L, h) channel pair by channel pair, each operation in the dtype of ``periods``."""
    dtype, half = periods.dtype, q.shape[-1] // 2
    out = q.to(dtype).clone()
    for index in range(rows * columns):
        centres = [
            2.0 * ((torch.tensor(i, dtype=dtype) + 0.5) / n) - 1.0
            for i, n in ((index // columns, rows), (index % columns, columns))
        ]
        angle = torch.cat([2 * torch.pi * c / periods for c in centres])  # (h/2,)
        cos, sin = angle.cos(), angle.sin()
        x = q[:, :, prefix + index].to(dtype)
        a, b = x[..., :half], x[..., half:]
        out[:, :, prefix + index] = torch.cat([a * cos + -b * sin, b * cos + a * sin], -1)
    return out.to(q.dtype)


Weights = dict[str, Tensor]
Branch = tuple[Tensor, float]  # the images that a branch of a block is computed for, and what it is multiplied by


def linear(w: Weights, x: Tensor, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def rms(w: Weights, x: Tensor, name: str) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]


def layer_norm(w: Weights, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Branch | None) -> Tensor:
    if kept is None:
        return x + branch(x)
    images, factor = kept
    return x.index_add(0, images, branch(x[images]) * factor)


def plain_blocks(
    w: Weights, tower: str, x: Tensor, rows: int, columns: int, depth: int, heads: int,
    norm: Callable[[Weights, Tensor, str], Tensor], drop: Sequence[Branch] = (),
) -> Tensor:
    """(b, L, D) through the official blocks (swiglu) as one would write them without packing.

    The last rows * columns tokens are patches. ``drop``: stochastic depth, of each block's attention and feed-forward.
    """
    kept = list(drop) or [None] * (2 * depth)
    periods, prefix = w[f"{tower}.rope_embed.periods"], x.shape[1] - rows * columns

    def attention(x: Tensor) -> Tensor:
        qkv = linear(w, norm(w, x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (plain_rope(t, periods, rows, columns, prefix) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear(w, attended, f"{block}.attn.proj")

    def feed_forward(x: Tensor) -> Tensor:
        y = norm(w, x, f"{block}.norm2")
        gated = F.silu(linear(w, y, f"{block}.mlp.w1")) * linear(w, y, f"{block}.mlp.w2")
        return linear(w, gated, f"{block}.mlp.w3")

    for i in range(depth):
        block = f"{tower}.blocks.{i}"
        x = add_branch(x, attention, kept[2 * i])
        x = add_branch(x, feed_forward, kept[2 * i + 1])
    return x


def plain_trunk(
    w: Weights, images: Tensor, depth: int, heads: int, mask: Tensor | None = None, drop: Sequence[Branch] = ()
) -> tuple[Tensor, Tensor]:
    """The official trunk (rmsnorm): tokens before and after the norm."""
    x = F.conv2d(images, w["trunk.patch_embed.proj.weight"], w["trunk.patch_embed.proj.bias"], stride=16)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    if mask is not None:
        x = torch.where(mask[..., None], w["trunk.mask_token"], x)
    x = torch.cat([w["trunk.cls_token"].expand(len(x), -1, -1), x], 1)
    x = plain_blocks(w, "trunk", x, rows, columns, depth, heads, rms, drop)
    return x, rms(w, x, "trunk.norm")


def plain_latents(w: Weights, images: Tensor, depth: int, heads: int) -> Tensor:
    """(b, bottleneck, H / 16, W / 16)."""
    patches = plain_trunk(w, images, depth, heads)[1][:, 1:] @ w["trunk.feature_bottleneck.weight"].T
    return patches.transpose(1, 2).unflatten(2, (images.shape[-2] // 16, images.shape[-1] // 16))


def plain_decoder(w: Weights, latents: Tensor, depth: int, heads: int) -> Tensor:
    """The official pixel decoder (layernorm): (b, bottleneck, h, w) -> (b, 3, 16 h, 16 w)."""
    rows, columns = latents.shape[-2:]
    x = F.conv2d(latents, w["pixel_decoder.proj_in.weight"], w["pixel_decoder.proj_in.bias"])
    x = plain_blocks(w, "pixel_decoder", x.flatten(2).transpose(1, 2), rows, columns, depth, heads, layer_norm)
    weight = w["pixel_decoder.proj_out.weight"].flatten(1)
    x = F.linear(layer_norm(w, x, "pixel_decoder.norm"), weight, w["pixel_decoder.proj_out.bias"])
    x = x.unflatten(1, (rows, columns)).unflatten(3, (3, 16, 16))  # (b, h, w, 3, 16, 16)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def plain_dino_head(w: Weights, x: Tensor) -> Tensor:
    """(..., D) -> prototype logits, before any temperature."""
    for layer in (0, 2):
        x = F.gelu(linear(w, x, f"dino_head.mlp.{layer}"))
    x = linear(w, x, "dino_head.mlp.4")
    v = w["dino_head.last_layer.weight_v"]
    prototypes = w["dino_head.last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True) @ prototypes.T
