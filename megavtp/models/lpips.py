"""This is LPIPS, the learnt perceptual distance (arXiv 1801.03924), on AlexNet or VGG16 features.

Letters: b images, C channels of a tapped layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.errors import UserError
from megavtp.models.fitting import misfits
from megavtp.nn.compiling import Region

Net = Literal["alex", "vgg"]

# The ImageNet mean and standard deviation for inputs in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Conv:
    """A convolution with ReLU; ``pool`` is the kernel of the max-pool (stride 2) in front of it, 0 = none."""

    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = False


def _vgg16() -> tuple[Conv, ...]:
    layers, inputs = [], 3
    for stage, (width, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        for i in range(count):
            layers.append(Conv(inputs, width, pool=2 if stage and i == 0 else 0, tap=i == count - 1))
            inputs = width
    return tuple(layers)


NETS: dict[str, tuple[Conv, ...]] = {
    "alex": (
        Conv(3, 64, 11, 4, 2, tap=True), Conv(64, 192, 5, padding=2, pool=3, tap=True),
        Conv(192, 384, pool=3, tap=True), Conv(384, 256, tap=True), Conv(256, 256, tap=True),
    ),
    "vgg": _vgg16(),
}


def weight_shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor: conv.I.weight, conv.I.bias, and head.J, weights (C,) of the J-th tap."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, conv in enumerate(NETS[net]):
        shapes[f"conv.{i}.weight"] = (conv.outputs, conv.inputs, conv.kernel, conv.kernel)
        shapes[f"conv.{i}.bias"] = (conv.outputs,)
    taps = [conv.outputs for conv in NETS[net] if conv.tap]
    return shapes | {f"head.{j}": (channels,) for j, channels in enumerate(taps)}


PERCEPTUAL_NETS: dict[str, Net] = {"lpips-vgg": "vgg", "lpips-alex": "alex"}  # values of the config's `perceptual`


def tap_distance(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Return the distances (b,) of two features (b, C, H, W) of one layer, whose channels have weights (C,)."""
    # The channels lie last in memory. Seen as the last dimension, they do so in gradients as well.
    squares = (_unit(a.movedim(1, -1)) - _unit(b.movedim(1, -1))).square()
    return (squares * weights).sum(-1).mean((1, 2))


def _unit(x: Tensor) -> Tensor:
    """Scale x (..., C) to unit length, in float32: a 16-bit float would lose the 1e-10 and divide by zero."""
    x = x.float()
    # vector_norm, because the gradient of sqrt at an all-zero pixel would be NaN.
    return x * (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-10).reciprocal()


class LPIPS(nn.Module):
    """A frozen network; ``forward(x, y)`` gives one distance per image, differentiable with respect to x."""

    tap_distance = Region(tap_distance)

    def __init__(self, net: Net, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32):
        """``weights`` must have the names and shapes of ``weight_shapes``; else this raises UserError.

        ``dtype`` is what the convolutions compute in. What follows them is float32: the difference of two features
        would keep few of 8 bits.
        """
        super().__init__()
        self.layers = NETS[net]
        if wrong := misfits(weights, weight_shapes(net)):
            raise UserError(f"these tensors are not those of LPIPS-{net}: {', '.join(wrong)}; give other weights")
        # Buffers, not parameters: nothing here is trained, averaged or saved.
        for name, tensor in weights.items():
            tensor = tensor.detach().to(dtype if name.startswith("conv") else torch.float32)
            if tensor.dim() == 4:  # all is in channels-last order, which convolutions are fastest in
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (b, 3, H, W) in [-1, 1] -> distances (b,), float32. No gradient flows to y."""
        y = y.detach()
        if x.requires_grad and torch.is_grad_enabled():
            taps = self._taps(x)
            with torch.no_grad():  # nothing of this branch is kept for the backward pass
                targets = self._taps(y)
        else:
            pairs = [both.chunk(2) for both in self._taps(torch.cat([x, y]))]
            taps, targets = [a for a, _ in pairs], [b for _, b in pairs]
        total = x.new_zeros(len(x), dtype=torch.float32)
        for j, (a, b) in enumerate(zip(taps, targets)):
            total = total + self.tap_distance(a, b, self.get_buffer(f"head_{j}"))
        return total

    def _taps(self, x: Tensor) -> list[Tensor]:
        dtype = self.get_buffer("conv_0_weight").dtype
        channels = zip(x.float().unbind(1), SHIFT, SCALE)
        channels_last = torch.stack([(channel - shift) / scale for channel, shift, scale in channels], -1)
        x = channels_last.to(dtype).movedim(-1, 1)
        taps = []
        for i, conv in enumerate(self.layers):
            if conv.pool:
                x = F.max_pool2d(x, conv.pool, 2)
            weight, bias = self.get_buffer(f"conv_{i}_weight"), self.get_buffer(f"conv_{i}_bias")
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding).relu_()
            if conv.tap:
                taps.append(x)
        return taps


def empty_lpips(net: Net, dtype: torch.dtype) -> LPIPS:
    """Return the network with weights that have no values yet, to count what it takes."""
    return LPIPS(net, {name: torch.empty(shape) for name, shape in weight_shapes(net).items()}, dtype)
