"""The discriminator of the decoder's second stage: it tells decoded pictures from real ones.

Its heads look at the tokens of a frozen network, at several depths (LADD, arXiv 2403.12015; StyleGAN-T, arXiv
2301.09515), or one head looks at the pixels themselves (PatchGAN, arXiv 1611.07004). Every convolution is spectrally
normalised (arXiv 1802.05957), so that a step of the discriminator changes its answer by a bounded amount.

The singular vectors that the normalisation needs are an input: whoever trains the discriminator carries them from step
to step, so that its modules hold nothing but parameters.

Letters: b pictures, N tokens, C channels, M answers for a picture.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.nn.seeded import named_generator

Directions = Mapping[str, tuple[Tensor, Tensor]]
"""Left and right singular vector of each convolution, by the name of its weight in the discriminator."""

TOKENS_SEEN = 9  # by a head's second convolution
_PIXEL_WIDTHS = (64, 128, 256)


class SpectralConv(nn.Module):
    """A convolution whose weight is divided by its largest singular value, on tokens or on pixels."""

    def __init__(self, inputs: int, outputs: int, *kernel: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.convolve = {1: F.conv1d, 2: F.conv2d}[len(kernel)]
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, direction: tuple[Tensor, Tensor]) -> Tensor:
        left, right = direction
        # Written as a sum, which autocast leaves in float32. Its gradient by the weight is part of the layer's.
        largest = (left[:, None] * self.weight.flatten(1).float() * right).sum()
        return self.convolve(x, self.weight / largest, self.bias, self.stride)


class TokenHead(nn.Module):
    """One answer for each token: (b, N, C) -> (b, N). Tokens are taken as a ring in row-major order."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = SpectralConv(channels, channels, 1)
        self.norm_mix = nn.InstanceNorm1d(channels, affine=True)
        self.neighbours = SpectralConv(channels, channels, TOKENS_SEEN)
        self.norm_neighbours = nn.InstanceNorm1d(channels, affine=True)
        self.answer = SpectralConv(channels, 1, 1)

    def forward(self, tokens: Tensor, directions: Directions, prefix: str) -> Tensor:
        x = tokens.transpose(1, 2)
        x = F.leaky_relu(self.norm_mix(self.mix(x, directions[f"{prefix}.mix.weight"])), 0.2)
        ring = F.pad(x, (TOKENS_SEEN // 2, TOKENS_SEEN // 2), mode="circular")
        y = self.norm_neighbours(self.neighbours(ring, directions[f"{prefix}.neighbours.weight"]))
        x = (x + F.leaky_relu(y, 0.2)) / math.sqrt(2)
        return self.answer(x, directions[f"{prefix}.answer.weight"]).flatten(1)


class PixelHead(nn.Module):
    """One answer for each patch of a picture: (b, 3, H, W) -> (b, M)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            SpectralConv(inputs, outputs, 4, 4, stride=2) for inputs, outputs in zip((3, *_PIXEL_WIDTHS), _PIXEL_WIDTHS)
        )
        self.norms = nn.ModuleList(nn.InstanceNorm2d(width, affine=True) for width in _PIXEL_WIDTHS[1:])
        self.answer = SpectralConv(_PIXEL_WIDTHS[-1], 1, 4, 4)

    def forward(self, x: Tensor, directions: Directions, prefix: str) -> Tensor:
        for i, down in enumerate(self.down):
            x = down(F.pad(x, (1, 1, 1, 1)), directions[f"{prefix}.down.{i}.weight"])
            x = F.leaky_relu(self.norms[i - 1](x) if i else x, 0.2)
        return self.answer(F.pad(x, (1, 1, 1, 1)), directions[f"{prefix}.answer.weight"]).flatten(1)


class Discriminator(nn.Module):
    """Heads on the outputs of a feature network.

    ``widths`` has the channels of each output; None: the output is the picture itself.
    """

    def __init__(self, widths: Sequence[int | None]):
        super().__init__()
        self.heads = nn.ModuleList(PixelHead() if width is None else TokenHead(width) for width in widths)

    def forward(
        self, anchor: Tensor, features: Sequence[Tensor] | None = None, directions: Directions | None = None
    ) -> Any:
        """Return the answers (b, M) of all heads in float32; a high one says that the picture is real.

        Without features, return a zero whose gradient by every parameter is zero, and copies of all parameters in
        order: where an engine keeps weights in parts, they are whole only in here.

        ``anchor`` is a zero that wants a gradient. ZeRO-3 reduces a module's gradients when that of its inputs is
        there; of inputs that want none it would take them before they are computed.
        """
        if features is None or directions is None:
            zero = torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0.0
            return zero + anchor, *(parameter.detach().clone() for parameter in self.parameters())
        answers = [
            head(x, directions, f"heads.{i}") for i, (head, x) in enumerate(zip(self.heads, features, strict=True))
        ]
        return torch.cat(answers, 1).float() + anchor

    def normalised(self) -> list[str]:
        """Name the weights that are spectrally normalised."""
        return [f"{name}.weight" for name, module in self.named_modules() if isinstance(module, SpectralConv)]


def first_direction(name: str, weight: Tensor) -> Tensor:
    """Draw the left vector (outputs,) that the power iteration of a weight begins with."""
    return F.normalize(torch.randn(weight.shape[0], generator=named_generator(f"direction of {name}")), dim=0)


@torch.no_grad()
def power_iteration(weight: Tensor, left: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Bring ``left`` nearer to the weight's largest left singular vector; return it and the right one."""
    matrix = weight.flatten(1).float()
    right = left
    for _ in range(iterations):
        right = F.normalize(matrix.T @ left, dim=0)
        left = F.normalize(matrix @ right, dim=0)
    return left, right
