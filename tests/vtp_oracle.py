"""Stored inputs and outputs of the official VTP code (CPU, float32), and a plain re-statement of its trunk.

RoPE rounds queries and keys to bfloat16, so a difference of 1e-7 in a matrix product (another CPU, another BLAS) may
flip one rounding and show as 1e-4 further on. Hence two checks: the plain trunk, which uses the same products, must
agree to 1e-5; the stored outputs must agree on average, where a rotation in float32 would be off by 1e-3.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megavtp.config.schema import DecoderConfig, DinoHeadConfig, ModelConfig, TextConfig, VisionConfig

DATA = Path(__file__).parent / "data" / "vtp"

TINY = ModelConfig(
    image_size=64, bottleneck=16,
    vision=VisionConfig(width=128, depth=3, heads=2),
    text=TextConfig(width=64, depth=2, heads=4, context_length=16, vocab_size=512),
    decoder=DecoderConfig(width=128, depth=2, heads=2),
    dino_head=DinoHeadConfig(prototypes=96, hidden=48, bottleneck=24),
)


def stored(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def assert_matches_oracle(x: Tensor, expected: Tensor) -> None:
    assert x.shape == expected.shape
    difference = (x.float() - expected.float()).abs()
    assert difference.mean() < 5e-5, difference.mean()
    assert difference.max() < 1e-2, difference.max()


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


def plain_trunk(
    w: dict[str, Tensor], images: Tensor, depth: int, heads: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The official trunk (swiglu, rmsnorm) as one would write it without packing: tokens before and after the norm."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def rms(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]

    x = F.conv2d(images, w["trunk.patch_embed.proj.weight"], w["trunk.patch_embed.proj.bias"], stride=16)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    if mask is not None:
        x = torch.where(mask[..., None], w["trunk.mask_token"], x)
    x = torch.cat([w["trunk.cls_token"].expand(len(x), -1, -1), x], 1)
    for i in range(depth):
        block = f"trunk.blocks.{i}"
        qkv = linear(rms(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (plain_rope(t, w["trunk.rope_embed.periods"], rows, columns, 1) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{block}.attn.proj")
        y = rms(x, f"{block}.norm2")
        gated = F.silu(linear(y, f"{block}.mlp.w1")) * linear(y, f"{block}.mlp.w2")
        x = x + linear(gated, f"{block}.mlp.w3")
    return x, rms(x, "trunk.norm")
