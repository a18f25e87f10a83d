"""Stored weights, inputs and outputs of the official LightningDiT (CPU, float32), small models for tests, and a plain
re-statement of the model for what no stored output shows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megavtp.dit.config import DiTModelConfig
from megavtp.dit.model.build import build_dit
from megavtp.dit.model.model import DiT
from megavtp.models.fitting import load_whole
from megavtp.parallel.mesh import SINGLE

DATA = Path(__file__).parent / "data" / "lightningdit"
OFFICIAL = DiTModelConfig(width=144, depth=2, heads=2, latent_size=4, latent_channels=8, num_classes=10)


def stored(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def stored_json(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def official_dit() -> DiT:
    """With the stored weights."""
    model = build_dit(OFFICIAL)
    load_whole(model, stored("state"), SINGLE, dict(model.named_parameters()))
    return model


def plain_rotation(x: Tensor, side: int) -> Tensor:
    """Rotate (b, heads, N, h) pair by pair: the first half of the channels by the row, the second by the column."""
    out, half = x.clone(), x.shape[-1] // 2
    for token in range(side * side):
        for start, position in ((0, token // side), (half, token % side)):
            for k in range(half // 2):
                angle = torch.tensor(position * 10000.0 ** (-2 * k / half))
                a, b = x[:, :, token, start + 2 * k], x[:, :, token, start + 2 * k + 1]
                out[:, :, token, start + 2 * k] = a * angle.cos() - b * angle.sin()
                out[:, :, token, start + 2 * k + 1] = b * angle.cos() + a * angle.sin()
    return out


def plain_dit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, config: DiTModelConfig) -> Tensor:
    """LightningDiT as one would write it down, of patch 1: the velocity (b, C, H, W). ``w``: by its keys, with
    ``pos_embed``."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def rms(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def chunks(name: str, count: int) -> list[Tensor]:
        return linear(F.silu(c), f"{name}.adaLN_modulation.1")[:, None].chunk(count, -1)

    side = config.latent_size
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"])
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    angles = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    time = torch.cat([angles.cos(), angles.sin()], 1)
    c = linear(F.silu(linear(time, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = c + w["y_embedder.embedding_table.weight"][y]
    for i in range(config.depth):
        block = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks(block, 6)
        attended = rms(tokens, f"{block}.norm1") * (1 + scale_a) + shift_a
        qkv = linear(attended, f"{block}.attn.qkv").unflatten(-1, (3, config.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if config.qk_norm:  # before the rotation
            q, k = rms(q, f"{block}.attn.q_norm"), rms(k, f"{block}.attn.k_norm")
        q, k = plain_rotation(q, side), plain_rotation(k, side)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + gate_a * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = rms(tokens, f"{block}.norm2") * (1 + scale_m) + shift_m
        a, b = linear(hidden, f"{block}.mlp.w12").chunk(2, -1)
        tokens = tokens + gate_m * linear(F.silu(a) * b, f"{block}.mlp.w3")
    shift, scale = chunks("final_layer", 2)
    tokens = linear(rms(tokens, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    return tokens.transpose(1, 2).unflatten(2, (side, side))
