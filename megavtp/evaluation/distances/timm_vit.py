"""Distances may be of the features of a ViT of the timm library, such as DINOv2's (as in arXiv 2306.04675)."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.evaluation.distances.network import FeatureNetwork
from megavtp.models.feature_networks import load_timm_vit
from megavtp.pixels import from_unit

_SIZE = 224


class TimmViT(FeatureNetwork):
    """The network resizes images to 224 x 224 (or whole patches below that), bicubic with antialiasing, normalises them
    as it was trained, and gives what its classifier would read: of DINOv2 the class token after the last norm."""

    def __init__(self, name: str, weights: str | Path, device: torch.device | str = "cpu"):
        """Raises ``UserError`` if timm is absent or knows no ViT of this name, or the weights are not its own."""
        remedy = "give the file of its weights (.safetensors or .pth)"
        model = load_timm_vit(name, weights, f"--timm {name}", f"--timm {name}: {remedy}").to(device)
        with open(weights, "rb") as file:
            self._digest = hashlib.file_digest(file, "sha256").hexdigest()
        patch = model.patch_embed.patch_size[0]
        self._model, self._size = model, _SIZE // patch * patch
        self._mean, self._std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        self.name = self.title = name
        self.dims = model.num_features

    @property
    def made_by(self) -> str:
        """The name and the weights: other weights give other features."""
        return f"{self.name} {self._digest[:16]}"

    def _features(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, (self._size, self._size), mode="bicubic", antialias=True)
        return self._model(from_unit(x.clamp(0, 1), self._mean, self._std))
