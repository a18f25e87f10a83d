"""Mean and variance of each latent channel in one pass, in float64 (Chan, Golub and LeVeque, 1979)."""

import json
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from megavtp.errors import UserError
from megavtp.json_file import Finite, Positive, parse_json
from megavtp.latents.artifact import LatentStatistics


class _Dumped(NamedTuple):
    """The JSON list that ``Moments.dump`` writes."""

    images: Positive
    numbers: Positive
    mean: list[Finite]
    squares: list[Annotated[Finite, Field(ge=0)]]


def channel_moments(latents: Tensor) -> Tensor:
    """Return (2, C) float64 of (b, C, h, w), on its device: means, and sums of squared distances from them."""
    mean = latents.mean((0, 2, 3), dtype=torch.float64)
    return torch.stack([mean, (latents - mean[:, None, None]).square_().sum((0, 2, 3))])


@dataclass(frozen=True)
class Moments:
    """Means, and sums of squared distances from them, of ``count`` numbers in each channel, from ``images`` images."""

    images: int
    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, latents_shape: tuple[int, ...], values: Tensor) -> "Moments":
        """Make them from the result of ``channel_moments`` on the host; ``latents_shape`` is (b, C, h, w)."""
        images, _, height, width = latents_shape
        return cls(images, images * height * width, *values.numpy())

    def joined(self, other: "Moments") -> "Moments":
        """Return the moments of both together; another order of joining may change the last bits."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            self.images + other.images, count, self.mean + apart * (other.count / count),
            self.squares + other.squares + apart**2 * (self.count * other.count / count),
        )

    def statistics(self) -> LatentStatistics:
        """Return mean and unbiased standard deviation, as LightningDiT does. UserError if a channel never changes."""
        std = np.sqrt(self.squares / max(self.count - 1, 1))
        return LatentStatistics(tuple(self.mean.tolist()), tuple(std.tolist()), self.images)

    def dump(self) -> str:
        """Write JSON that ``load`` turns into the same bits."""
        return json.dumps([self.images, self.count, self.mean.tolist(), self.squares.tolist()])

    @classmethod
    def load(cls, text: str, channels: int, where: str) -> "Moments":
        """Invert ``dump``. UserError if the text is something else, or has another number of channels."""
        remedy = "remove that file, then start again"
        images, count, mean, squares = parse_json(text, _Dumped, where, remedy)
        if not len(mean) == len(squares) == channels:
            raise UserError(f"{where}: its sums are not of {channels} channels; {remedy}")
        return cls(images, count, np.array(mean), np.array(squares))
