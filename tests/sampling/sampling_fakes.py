"""A tokenizer with known weights and small DiTs for its latents, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from vtp_oracle import DATA

import megavtp
from megavtp.checkpoint.formats.convert import write_native
from megavtp.checkpoint.kind import FACTS
from megavtp.dit.checkpoint import AVERAGE, TRAINED
from megavtp.dit.config import DiTConfig, DiTModelConfig
from megavtp.dit.model.build import build_dit
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact

TOKENIZER = DATA / "default"
NAMES = ["Animals", "Flags", "Food & Drink"]
CHANNELS = 16
STATISTICS = LatentStatistics(tuple(0.01 * c for c in range(CHANNELS)), (0.5,) * CHANNELS, 100)


def tokenizer_facts() -> TokenizerArtifact:
    return megavtp.load_tokenizer(TOKENIZER).artifact


def lively_dit(seed: int, **model):
    """A DiT whose output is not the zero that it starts with."""
    sizes = {"width": 48, "depth": 2, "heads": 4, "latent_size": 4, "latent_channels": CHANNELS, "num_classes": 3}
    config = DiTModelConfig(**{**sizes, **model})
    dit = build_dit(config, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if "adaLN" in name or "final_layer.linear" in name:
                parameter.normal_(0, 0.2, generator=draw)
    return dit


def write_dit(folder: Path, artifact: TokenizerArtifact | None, names=NAMES, **model) -> Path:
    """A checkpoint as the trainer leaves it: trained weights of seed 1, averaged ones of seed 2."""
    tensors, dit = {}, None
    for prefix, seed in ((TRAINED, 1), (AVERAGE, 2)):
        dit = lively_dit(seed, **model)
        tensors |= {prefix + name: parameter.detach() for name, parameter in dit.named_parameters()}
    facts = {FACTS: {"visual_tokenizer": artifact and artifact.to_dict(), "classes": names}}
    write_native(folder, 7, tensors, DiTConfig(model=dit.config), facts)
    return folder
