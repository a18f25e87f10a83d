"""An evaluation needs this of a model, a data set and a caption tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Evaluated(Protocol):
    """A model under evaluation. Images are ImageNet-normalised floats (b, 3, H, W), tokens are ids (b, T).

    ``objectives`` are those that the model was built for: without "contrastive" there is no text tower, without
    "reconstruction" no pixel decoder, and the metrics that need them are left out.
    """

    objectives: frozenset[str]

    def encode_image(self, images: Tensor) -> Tensor:
        """Return L2-normalised features (b, E)."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return L2-normalised features (b, E)."""

    def features(self, images: Tensor) -> Tensor:
        """Return the frozen encoder's class token (b, D)."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return images (b, 3, H, W), normalised alike."""


class EvaluationSet(Protocol):
    """Samples in a fixed order that ``world`` readers share, as in ``megavtp.data.loader.EvalDataset``."""

    def __len__(self) -> int:
        """Count the samples of all readers."""

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """Give dicts of index (b,), image uint8 (b, 3, H, W), tokens (b, T), caption list[str], meta list[dict]."""


class CaptionEncoder(Protocol):
    def encode(self, captions: list[str]) -> Tensor:
        """Return ids (n, T)."""


class NoCaptions:
    """This replaces the tokenizer if the model reads no captions: each caption is the single id 0."""

    vocab_size = context_length = 1

    def encode(self, captions: list[str]) -> Tensor:
        return torch.zeros(len(captions), 1, dtype=torch.long)


class VTPEvaluated:
    """``Evaluated`` for a ``VTP`` or the engine around one: every call is a forward of the root module.

    Outputs are float32 whatever the precision of the compute.
    """

    def __init__(self, model: Callable[..., Any], objectives: Collection[str]):
        self.model = model
        self.objectives = frozenset(objectives)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model("encode_image", images=images).float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.model("encode_text", tokens=tokens).float()

    def features(self, images: Tensor) -> Tensor:
        cls, _ = self.model("features", images=images)
        return cls.float()

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.model("reconstruction", images=images).float()


Probe = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""This maps images uint8 (b, 3, H, W) and tokens (b, T) to named values per sample (b, ...)."""

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""This maps two batches of images (b, 3, H, W) in [-1, 1] to the distance of each pair (b,)."""
