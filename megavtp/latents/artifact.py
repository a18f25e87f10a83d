"""The facts of a tokenizer besides its weights, which making, normalising and decoding its latents need.

``visual_tokenizer.json`` lies in a converted tokenizer's folder, in a folder of latents that it made, and (as a
mapping) in the checkpoint of a DiT trained on them. The fingerprint tells whether they belong together.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from megavtp.config.ranges import MAX_PIXELS, MAX_WIDTH
from megavtp.data.files import write_json
from megavtp.data.torch_file import FLOATS, read_torch_file, write_torch_file
from megavtp.errors import UserError
from megavtp.json_file import Count, Finite, check_form, form, read_json
from megavtp.pixels import IMAGENET_MEAN, IMAGENET_STD

FILE = "visual_tokenizer.json"
STATISTICS_FILE = "latents_stats.pt"  # LightningDiT's: {"mean", "std"}, each (1, C, 1, 1) float32
_Pixels = Annotated[int, Field(gt=0, le=MAX_PIXELS)]
_Channels = Annotated[int, Field(gt=0, le=MAX_WIDTH)]


@form
class _StoredStatistics:
    mean: tuple[Finite, ...]
    std: tuple[Finite, ...]
    images: Count | None


@form
class _Stored:
    """The form of ``TokenizerArtifact.to_dict``, of which all keys must be there."""

    version: Literal[1]
    fingerprint: str
    image_size: _Pixels
    patch_size: _Pixels
    latent_channels: _Channels
    pixel_mean: tuple[Finite, Finite, Finite]
    pixel_std: tuple[Finite, Finite, Finite]
    captions: str | None
    statistics: _StoredStatistics | None


@dataclass(frozen=True)
class LatentStatistics:
    """The mean and standard deviation of each latent channel over images and positions."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int | None = None  # how many they were taken over; None = unknown (a file of another project)

    def __post_init__(self) -> None:
        values = (*self.mean, *self.std)
        if not self.mean or len(self.mean) != len(self.std) or not all(map(math.isfinite, values)):
            raise UserError("latent statistics need one finite mean and one finite std per channel; extract them again")
        if min(self.std) <= 0:
            raise UserError(
                f"latent statistics: channel {self.std.index(min(self.std))} has the std {min(self.std)}, a channel "
                "that never changes cannot be normalised; extract them over more images"
            )

    def normalise(self, latents: Tensor) -> Tensor:
        """Return (x - mean) / std per channel of (..., C, h, w)."""
        mean, std = self._tensors(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return x * std + mean per channel of (..., C, h, w)."""
        mean, std = self._tensors(latents)
        return latents * std + mean

    def agree(self, other: "LatentStatistics") -> bool:
        """Whether both are equal in float32, to which ``latents_stats.pt`` rounds them."""
        return all(torch.equal(*map(torch.tensor, pair)) for pair in ((self.mean, other.mean), (self.std, other.std)))

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.ndim < 3 or like.shape[-3] != len(self.mean):
            raise UserError(f"latents of shape {tuple(like.shape)} do not have the {len(self.mean)} channels (C, h, w) "
                            "of the latent statistics; use the tokenizer that the statistics belong to")
        mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.mean, self.std))
        return mean[:, None, None], std[:, None, None]

    @classmethod
    def read(cls, path: str | Path) -> "LatentStatistics":
        """Read LightningDiT's ``latents_stats.pt``. Raises UserError."""
        remedy = "extract the latents again, which writes it"
        tree = read_torch_file(path, remedy)
        found = [tree.get(name) for name in ("mean", "std")] if isinstance(tree, dict) else []
        tensors = [value for value in found if isinstance(value, Tensor) and value.dtype in FLOATS]
        if len(tensors) < 2:
            raise UserError(f"{path} does not hold the floating point tensors mean and std; {remedy}")
        if wrong := [tuple(t.shape) for t in tensors if t.numel() != max(t.shape, default=1)]:
            raise UserError(f"{path}: mean and std are one number per channel, not of shape {wrong[0]}; {remedy}")
        mean, std = (tuple(t.flatten().tolist()) for t in tensors)
        try:
            return cls(mean, std)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def write(self, path: str | Path) -> None:
        """Write LightningDiT's ``latents_stats.pt``, rounded to float32. Raises OSError."""
        shaped = {name: torch.tensor(getattr(self, name)).view(1, -1, 1, 1) for name in ("mean", "std")}
        write_torch_file(path, shaped)


@dataclass(frozen=True)
class TokenizerArtifact:
    """The facts of a visual tokenizer."""

    fingerprint: str  # of the encoder: its weights and what else decides a latent; a fine-tuned decoder keeps it
    image_size: int  # pixels of the side it was trained on
    patch_size: int  # pixels per latent position
    latent_channels: int  # C of the latents (b, C, H / patch_size, W / patch_size)
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN  # the encoder takes (pixels in 0..1 - mean) / std
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    captions: str | None = None  # "clip", or the caption tokenizer's file name beside this one; None = no text encoder
    statistics: LatentStatistics | None = None  # of the latents; None until they have been extracted

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON types."""
        return {"version": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "TokenizerArtifact":
        """Invert ``to_dict``; ``where`` names the source in errors."""
        remedy = "convert the tokenizer, or extract the latents, again"
        stored = check_form(dict(values), _Stored, where, remedy)
        found = stored.statistics
        if found is not None and len(found.mean) != stored.latent_channels:
            channels = f"statistics of {len(found.mean)} channels do not belong to latents of {stored.latent_channels}"
            raise UserError(f"{where}: {channels}; {remedy}")
        if stored.image_size % stored.patch_size or min(stored.pixel_std) <= 0:
            raise UserError(f"{where}: its sizes do not fit one another, or pixel_std is not above 0; {remedy}")
        given = {field.name: getattr(stored, field.name) for field in fields(cls)}
        return cls(**given | {"statistics": found and LatentStatistics(found.mean, found.std, found.images)})

    @classmethod
    def read(cls, folder: str | Path) -> "TokenizerArtifact":
        """Read ``folder/visual_tokenizer.json``. UserError if it is missing or damaged."""
        path = Path(folder) / FILE
        remedy = "make it with tools/convert_checkpoint.py (a tokenizer) or tools/extract_latents.py (latents)"
        return cls.from_dict(read_json(path, dict[str, Any], remedy), str(path))

    def write(self, folder: str | Path) -> None:
        """Write ``folder/visual_tokenizer.json``, whole or not at all. Raises OSError."""
        write_json(Path(folder) / FILE, self.to_dict(), indent=2)

    def needed_statistics(self, where: str) -> LatentStatistics:
        """Return the statistics; UserError if none have been extracted."""
        if self.statistics is None:
            raise UserError(
                f"{where} has no latent statistics; run tools/extract_latents.py with this tokenizer and use its output"
            )
        return self.statistics


def check_same_tokenizer(one: TokenizerArtifact, where_one: str, other: TokenizerArtifact, where_other: str) -> None:
    """Raise UserError unless both have the same encoder and input, and their statistics, if both have them, agree."""
    for name, what in (
        ("fingerprint", "tokenizers"), ("pixel_mean", "pixel normalisations"), ("pixel_std", "pixel normalisations")
    ):
        if getattr(one, name) != getattr(other, name):
            raise UserError(
                f"{where_one} and {where_other} belong to different {what} ({_short(getattr(one, name))} and "
                f"{_short(getattr(other, name))}); use the tokenizer that made the latents"
            )
    if one.statistics and other.statistics and not one.statistics.agree(other.statistics):
        raise UserError(
            f"{where_one} and {where_other} have different latent statistics; use those the DiT was trained with"
        )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
