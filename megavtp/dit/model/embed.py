"""A DiT takes time and class or caption as one conditioning vector.

Letters: b samples, D width. Modules have LightningDiT's names, so that our keys are its own.
"""

import torch
from torch import Tensor, nn

from megavtp.dit.config import TIME_FREQUENCIES
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megavtp.parallel.mesh import Mesh


def _mlp(inputs: int, width: int, mesh: Mesh) -> nn.Sequential:
    return nn.Sequential(
        ColumnParallelLinear(inputs, width, mesh=mesh), nn.SiLU(), RowParallelLinear(width, width, mesh=mesh)
    )


def time_frequencies(t: Tensor) -> Tensor:
    """Map times (b,) in [0, 1] to 128 cosines and 128 sines (b, 256) float32, of frequencies 1 to almost 1/10000."""
    half = TIME_FREQUENCIES // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimeEmbed(nn.Module):
    """Embeds times (b,) as (b, D)."""

    def __init__(self, width: int, mesh: Mesh):
        super().__init__()
        self.mlp = _mlp(TIME_FREQUENCIES, width, mesh)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_frequencies(t))


class ClassEmbed(nn.Module):
    """Embeds labels (b,) in 0 .. classes as (b, D); the last row, label ``classes``, stands for "no class"."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)

    def none(self, count: int, device: torch.device) -> Tensor:
        """Return the condition (count,) of samples without a class."""
        return torch.full((count,), self.classes, device=device)


class CaptionEmbed(nn.Module):
    """Embeds the tokenizer's unit caption features (b, E) as (b, D). A feature of zeros, which no caption has, stands
    for "no caption"; the biases learn its embedding."""

    def __init__(self, features: int, width: int, mesh: Mesh):
        super().__init__()
        self.features = features
        self.mlp = _mlp(features, width, mesh)

    def forward(self, captions: Tensor) -> Tensor:
        return self.mlp(captions)

    def none(self, count: int, device: torch.device) -> Tensor:
        """Return the condition (count, E) of samples without a caption."""
        return torch.zeros(count, self.features, device=device)
