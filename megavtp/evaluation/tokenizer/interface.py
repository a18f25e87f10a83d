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
    text tower, without "reconstruction" no pixel decoder, and the metrics that need them are left out. The encoder has
    ``depth`` blocks.
    """

    def __init__(self, model: Callable[..., Any], objectives: Collection[str], depth: int):
        self.model = model
        self.objectives = frozenset(objectives)
        self.depth = depth

    def encode_image(self, images: Tensor) -> Tensor:
        """Return L2-normalised features (b, E)."""
        return self.model("encode_image", images=images).float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return L2-normalised features (b, E)."""
        return self.model("encode_text", tokens=tokens).float()

    def features(self, images: Tensor) -> Tensor:
        """Return the frozen encoder's class token (b, D)."""
        return self.model("features", images=images)[0].float()

    def last_blocks(self, images: Tensor, blocks: int) -> list[tuple[Tensor, Tensor]]:
        """Return the class token (b, D) and the patch tokens (b, N, D) of each of the last ``blocks`` blocks."""
        pairs = self.model("features", images=images, layers=range(-blocks, 0))
        return [(class_token.float(), patches.float()) for class_token, patches in pairs]

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (b, C, h, w)."""
        return self.model("encode", images=images).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (b, 3, H, W), normalised as the encoder's input."""
        return self.model("decode", latents=latents).float()


Perceptual = Callable[[Tensor, Tensor], Tensor]
"""This maps two batches of images (b, 3, H, W) in [-1, 1] to the distance of each pair (b,)."""
