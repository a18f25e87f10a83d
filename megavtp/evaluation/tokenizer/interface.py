"""What an evaluation asks of a model, of a data set and of a caption tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Evaluated(Protocol):
    """A model under evaluation. Images are ImageNet-normalised floats (b, 3, H, W), tokens are ids (b, T).

    ``objectives`` names what the model was built for: without "contrastive" there is no text tower, without
    "reconstruction" no pixel decoder, and the metrics that need them are left out.
    """

    objectives: frozenset[str]

    def encode_image(self, images: Tensor) -> Tensor:
        """-> (b, E), L2-normalised."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """-> (b, E), L2-normalised."""

    def features(self, images: Tensor) -> Tensor:
        """-> (b, D): the frozen encoder's class token."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """-> (b, 3, H, W) in the same normalised pixel space."""


class EvaluationSet(Protocol):
    """Samples in a fixed order, dealt to ``world`` readers (``megavtp.data.loader.EvalDataset``)."""

    def __len__(self) -> int:
        """Samples of all readers."""

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """-> dicts of index (b,), image uint8 (b, 3, H, W), tokens (b, T), caption list[str], meta list[dict]."""


class CaptionEncoder(Protocol):
    def encode(self, captions: list[str]) -> Tensor:
        """-> ids (n, T)."""


class NoCaptions:
    """Stands in for the tokenizer where no model reads captions: every one is the single id 0."""

    vocab_size = context_length = 1

    def encode(self, captions: list[str]) -> Tensor:
        return torch.zeros(len(captions), 1, dtype=torch.long)


class VTPEvaluated:
    """``Evaluated`` over a ``VTP`` or the engine that wraps one: every call is a forward of the root module.

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
"""(images uint8 (b, 3, H, W), tokens (b, T)) -> named per-sample values (b, ...)."""

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Two image batches (b, 3, H, W) in [-1, 1] -> distance of each pair (b,)."""
