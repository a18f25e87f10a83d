"""Distances compare images by the features of a network."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

INCEPTION = "inception"


class FeatureNetwork:
    """A frozen network that maps each image to a vector. Only Inception's distances have the names of the papers."""

    name: ClassVar[str]  # this is part of the names of metrics
    title: ClassVar[str]  # this is shown to people
    dims: ClassVar[int]

    def __call__(self, images: Tensor) -> Tensor:
        """Map images, uint8 (b, 3, H, W) on the network's device, to features (b, dims), float32.

        This is full float32 even inside autocast: TF32 would change a Frechet distance by more than models differ.
        """
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), exact:
            return self._features(images).float()

    def _features(self, images: Tensor) -> Tensor:
        raise NotImplementedError


MetricKind = Literal["frechet", "kernel", "kernel_std", "precision", "recall"]


def metric_name(kind: MetricKind, network: str, of: Literal["generation", "reconstruction"]) -> str:
    """Return the metric's key: "generation/gfid", "generation/kid", "reconstruction/fd_efficientnet", ..."""
    if network == INCEPTION:
        fid = {"generation": "gfid", "reconstruction": "rfid"}[of]
        return f"{of}/" + {"frechet": fid, "kernel": "kid", "kernel_std": "kid_std"}.get(kind, kind)
    short = {"frechet": "fd", "kernel": "kd", "kernel_std": "kd_std"}.get(kind, kind)
    return f"{of}/{short}_{network}"
