"""Distances compare images by the features of a network. FID is defined on those of the Inception-v3 of 2015."""

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megavtp.errors import UserError

INCEPTION = "inception"
# The file is weights-inception-2015-12-05-6726825d.pth of torch-fidelity, which is the same as pytorch-fid's
# pt_inception-2015-12-05-6726825d.pth. torch-fidelity would unpickle any file, and another network would give no FID.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
MetricKind = Literal["frechet", "kernel", "kernel_std", "precision", "recall"]


def exact_convolutions() -> AbstractContextManager[None]:
    """Return a context in which a GPU convolves float32 as such, and not as TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class FeatureNetwork:
    """A frozen network that maps each image to a vector. Only Inception's distances have the names of the papers."""

    name: str  # this is part of the names of metrics
    title: str  # this is shown to people
    dims: int

    @property
    def made_by(self) -> str:
        """What a file of statistics says of the network that its features are of."""
        return self.name

    def __call__(self, images: Tensor) -> Tensor:
        """Map images, uint8 (b, 3, H, W) on the network's device, to features (b, dims), float32.

        This is full float32 even inside autocast: TF32 would change a Frechet distance by more than models differ.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), exact_convolutions():
            return self._features(images).float()

    def _features(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Inception(FeatureNetwork):
    """The network resizes to 299 x 299 as TensorFlow 1 did, bilinear, and gives the 2048 averages of "pool3"."""

    name, title, dims = INCEPTION, "Inception", 2048

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        """Raises ``UserError`` if the file is not these weights, or torch-fidelity is missing."""
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            reason = error.strerror
            raise UserError(f"--inception {path} cannot be read: {reason}; give the file of the weights") from None
        if digest != INCEPTION_SHA256:
            raise UserError(
                f"--inception {path} is not the Inception network of FID (its SHA-256 differs), and is not opened: "
                "give weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception as error:  # its torchvision may be missing, or made for another torch
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--inception needs torch-fidelity, which cannot be imported ({reason}): pip install torch-fidelity, "
                "with a torchvision for this torch"
            ) from None
        self._network = FeatureExtractorInceptionV3(
            INCEPTION, [str(self.dims)], feature_extractor_weights_path=str(path)
        ).to(device)

    def _features(self, images: Tensor) -> Tensor:
        return self._network(images)[0]


def metric_name(kind: MetricKind, network: str, of: Literal["generation", "reconstruction"]) -> str:
    """Return the metric's key: "generation/gfid", "generation/kid", "reconstruction/fd_efficientnet", ..."""
    fid = "gfid" if of == "generation" else "rfid"
    if network == INCEPTION:
        return f"{of}/" + {"frechet": fid, "kernel": "kid", "kernel_std": "kid_std"}.get(kind, kind)
    return f"{of}/" + {"frechet": "fd", "kernel": "kd", "kernel_std": "kd_std"}.get(kind, kind) + f"_{network}"
