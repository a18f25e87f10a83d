"""A model and a data set small enough to evaluate in milliseconds, with the interfaces of the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STYLES = ("flat", "round")
GROUPS = ("warm", "cold", "grey-brown")


class FakeSet:
    """``samples`` images of random pixels; two styles of each concept, three groups, a caption per concept."""

    def __init__(self, samples: int, size: int = 16, fail_on_rank: int | None = None, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (samples, 3, size, size), generator=draw, dtype=torch.uint8)
        self.meta = [
            {"concept": f"c{i // 2}", "style": STYLES[i % 2], "group": GROUPS[i // 2 % 3]} for i in range(samples)
        ]
        self.captions = [f"thing {i // 2}" for i in range(samples)]
        self.fail_on_rank = fail_on_rank

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        own = range(rank, len(self.images), world)
        for start in range(0, len(own), batch_size):
            rows = list(own[start : start + batch_size])
            if rank == self.fail_on_rank:
                raise OSError("disk on fire")
            captions = [self.captions[i] for i in rows]
            yield {
                "index": torch.tensor(rows), "image": self.images[rows], "tokens": FakeTokenizer().encode(captions),
                "caption": captions, "meta": [self.meta[i] for i in rows],
            }


class FakeTokenizer:
    def encode(self, captions: list[str]) -> Tensor:
        return torch.tensor([[ord(c) for c in caption[:12].ljust(12)] for caption in captions])


class FakeModel:
    """Linear features with fixed random weights. Counts its calls, which must agree between ranks."""

    def __init__(self, objectives=("contrastive", "self_distillation", "reconstruction"), size: int = 16):
        draw = torch.Generator().manual_seed(1)
        self.objectives, self.depth = frozenset(objectives), 3
        self.project = torch.randn(3 * size * size, 8, generator=draw)
        self.embed = torch.randn(256, 12, 8, generator=draw)
        self.calls: list[str] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.calls.append("image")
        return F.normalize(images.flatten(1) @ self.project, dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.calls.append("text")
        return F.normalize(self.embed[tokens, torch.arange(tokens.shape[1])].sum(1), dim=-1)

    def features(self, images: Tensor) -> Tensor:
        self.calls.append("features")
        return images.flatten(1) @ self.project[:, :5]

    def last_blocks(self, images: Tensor, blocks: int) -> list[tuple[Tensor, Tensor]]:
        self.calls.append("last blocks")
        tokens = [images.flatten(1) @ self.project[:, i : i + 5] for i in range(blocks)][::-1]
        tokens = [F.layer_norm(x, (5,)) for x in tokens]  # as an encoder's last norm does it
        return [(x, torch.stack([x, x + images.mean((1, 2, 3))[:, None]], 1)) for x in tokens]

    def encode(self, images: Tensor) -> Tensor:
        """Half of each pixel: twelve channels in a quarter of the resolution."""
        self.calls.append("encode")
        return F.pixel_unshuffle(images / 2, 2)

    def decode(self, latents: Tensor) -> Tensor:
        self.calls.append("decode")
        return F.pixel_shuffle(latents, 2) * 1.8
