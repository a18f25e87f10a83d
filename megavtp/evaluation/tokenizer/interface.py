"""An evaluation sees a model through this."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor


class NoCaptions:
    """This replaces the tokenizer if the model reads no captions: each caption is the single id 0."""

    vocab_size = context_length = 1

    def encode(self, captions: list[str]) -> Tensor:
        return torch.zeros(len(captions), 1, dtype=torch.long)


class VTPEvaluated:
    """A ``VTP`` under evaluation, or the engine around one: every call is a forward of the root module.

    Images are ImageNet-normalised floats (b, 3, H, W), tokens are ids (b, T). Outputs are float32 whatever the
    precision of the compute. ``objectives`` are those that the model was built for: without "contrastive" there is no
    text tower, without "reconstruction" no pixel decoder, and the metrics that need them are left out.
    """

    def __init__(self, model: Callable[..., Any], objectives: Collection[str]):
        self.model = model
        self.objectives = frozenset(objectives)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return L2-normalised features (b, E)."""
        return self.model("encode_image", images=images).float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return L2-normalised features (b, E)."""
        return self.model("encode_text", tokens=tokens).float()

    def features(self, images: Tensor) -> Tensor:
        """Return the frozen encoder's class token (b, D)."""
        return self.model("features", images=images)[0].float()

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return images (b, 3, H, W), normalised alike."""
        return self.model("reconstruction", images=images).float()


Perceptual = Callable[[Tensor, Tensor], Tensor]
"""This maps two batches of images (b, 3, H, W) in [-1, 1] to the distance of each pair (b,)."""
