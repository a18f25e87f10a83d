"""Stored weights, inputs and outputs of the official LightningDiT (CPU, float32), and small models for tests."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from megavtp.config.dit import DiTModelConfig
from megavtp.models.dit import DiT
from megavtp.models.dit_build import build_dit, load_full_dit

DATA = Path(__file__).parent / "data" / "lightningdit"
OFFICIAL = DiTModelConfig(width=144, depth=2, heads=2, latent_size=4, latent_channels=8, num_classes=10)


def stored(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def stored_json(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def official_dit() -> DiT:
    """With the stored weights."""
    model = build_dit(OFFICIAL)
    load_full_dit(model, stored("state"))
    return model
