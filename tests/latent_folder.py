"""Small folders of latents for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact

FINGERPRINT = "ab" * 32


def artifact(channels: int, mean: float = 0.0, std: float = 1.0, fingerprint: str = FINGERPRINT) -> TokenizerArtifact:
    statistics = LatentStatistics((mean,) * channels, (std,) * channels, 100)
    return TokenizerArtifact(fingerprint, 64, 16, channels, statistics=statistics)


def random_shard(
    count: int, shape: tuple[int, ...], seed: int, classes: int = 3, captions: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    shard = {
        "latents": draw(count, *shape), "latents_flip": draw(count, *shape),
        "labels": torch.randint(classes, (count,), generator=generator),
    }
    if captions:
        shard["captions"] = torch.nn.functional.normalize(draw(count, captions), dim=-1)
    return shard


def write_latents(
    folder: Path, shards: Sequence[dict[str, Tensor]], metadata: dict[str, str] | None = None, **facts
) -> Path:
    """Write ``shards`` and the tokenizer's facts, which ``facts`` may change (see ``artifact``)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"latents_rank00_shard{number:03d}.safetensors", metadata)
    artifact(shards[0]["latents"].shape[1], **facts).write(folder)
    return folder


def random_latents(
    folder: Path, counts: Sequence[int] = (14, 10), shape: tuple[int, ...] = (4, 4, 4), captions: int = 0, **facts
) -> Path:
    shards = [random_shard(count, shape, seed, captions=captions) for seed, count in enumerate(counts)]
    return write_latents(folder, shards, **facts)
