"""A trained VTP as a visual tokenizer: images to latents and back, images and texts to features.

    tokenizer = megavtp.load_tokenizer("VTP-Large-f16d64", device="cuda", dtype=torch.bfloat16)
    latents = tokenizer.encode(images)          # (b, 3, H, W) -> (b, 64, H / 16, W / 16)
    images = tokenizer.decode(latents)          # back, in 0..1
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megavtp.checkpoint.formats.vtp_source import VTPSource, build_tokenizer, open_vtp
from megavtp.checkpoint.reading import Checkpoint
from megavtp.config.sizes import known
from megavtp.data.captions import CaptionTokenizer
from megavtp.data.captions import load_tokenizer as load_captions
from megavtp.data.files import refuse_hub_id
from megavtp.errors import UserError
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact, check_same_tokenizer
from megavtp.pixels import denormalise, normalise


def load_tokenizer(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *,
    latents: str | Path | None = None, opened: Checkpoint | None = None,
) -> "Tokenizer":
    """Load the tokenizer in a run's checkpoint folder or a released model's folder.

    Args:
        dtype: of the matrix products; weights stay float32, and latents, images and features come out in float32.
        latents: folder of extracted latents whose statistics to take; they must be of this tokenizer.
        opened: the run's checkpoint at ``path`` if it is open already, see ``checkpoint.once``; it stays open.

    Raises:
        UserError: the folder holds no tokenizer, is damaged, or has an artifact of other weights; ``latents`` belong to
            another tokenizer; the device or dtype does not exist.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype={dtype}: a tokenizer computes in torch.float32, torch.bfloat16 or torch.float16")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device={device}: no such device here; use cpu, cuda or cuda:N") from None
    tokenizer = Tokenizer(open_vtp(refuse_hub_id(path), opened=opened), device, dtype)
    if latents is not None:
        tokenizer.take_statistics(TokenizerArtifact.read(latents), str(latents))
    return tokenizer


class Tokenizer:
    """The frozen encoders and decoder of a VTP. Images may have any size in whole patches.

    Attributes:
        artifact: normalisation, sizes, fingerprint and, if they are known, latent statistics.
        model: the module, in eval mode.
    """

    def __init__(self, source: VTPSource, device: torch.device | str, dtype: torch.dtype):
        self.path, self.artifact = source.path, source.artifact
        self.device = torch.device(device)
        self.model = build_tokenizer(source, self.device, dtype)
        self._captions_at = source.captions

    @torch.no_grad()
    def encode(self, images: Tensor, normalised: bool = False) -> Tensor:
        """Return latents (b, C, H / patch, W / patch), float32, on the tokenizer's device.

        Args:
            images: (b, 3, H, W); uint8 in 0..255, or floating point in 0..1.
            normalised: subtract the channels' mean and divide by their std, as a DiT wants them.
        """
        latents = self.model("encode", images=self._pixels(images)).float()
        return self.statistics.normalise(latents) if normalised else latents

    @torch.no_grad()
    def decode(self, latents: Tensor, normalised: bool = False) -> Tensor:
        """Return images (b, 3, h * patch, w * patch), float32 in 0..1, clamped.

        ``normalised`` says that the latents are, as a DiT makes them. UserError when the model has no pixel decoder.
        """
        self._need("reconstruction", "pixel decoder")
        channels = self.artifact.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise UserError(f"latents of shape {tuple(latents.shape)}: expected (b, {channels}, h, w)")
        latents = latents.to(self.device, torch.float32)
        latents = self.statistics.denormalise(latents) if normalised else latents
        images = self.model("decode", latents=latents).float()
        return denormalise(images, self.artifact.pixel_mean, self.artifact.pixel_std).clamp_(0, 1)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit features (b, E), float32, in the space of ``encode_text``; ``images`` are as for ``encode``."""
        self._need("contrastive", "image projection")
        return self.model("encode_image", images=self._pixels(images))

    @torch.no_grad()
    def encode_text(self, texts: list[str] | Tensor) -> Tensor:
        """Return unit features (b, E), float32, of captions or of their token ids (b, context_length)."""
        self._need("contrastive", "text encoder")
        tokens = self._ids(texts) if isinstance(texts, Tensor) else self.captions.encode(list(texts))
        return self.model("encode_text", tokens=tokens.to(self.device))

    @cached_property
    def captions(self) -> CaptionTokenizer:
        """Open the caption tokenizer on first use. UserError if it is missing or belongs to another model."""
        self._need("contrastive", "text encoder")
        text = self.model.config.text
        found = load_captions(str(self._captions_at), self.path, text.context_length)
        if found.vocab_size != text.vocab_size:
            raise UserError(
                f"the caption tokenizer {self._captions_at} has {found.vocab_size} ids, the model {text.vocab_size}: "
                f"put the one it was trained with into {self.path} as captions.model"
            )
        return found

    @property
    def statistics(self) -> LatentStatistics:
        return self.artifact.needed_statistics(str(self.path))

    def take_statistics(self, artifact: TokenizerArtifact, where: str) -> None:
        """Adopt the statistics of the latents that lie at ``where``. UserError if they belong to another tokenizer, or
        this one has others."""
        check_same_tokenizer(self.artifact, str(self.path), artifact, where)
        self.artifact = replace(self.artifact, statistics=artifact.needed_statistics(where))

    def _pixels(self, images: Tensor) -> Tensor:
        """Check images, move them to the device and normalise them."""
        patch = self.artifact.patch_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images of shape {tuple(images.shape)}: expected (b, 3, H, W)")
        if images.shape[2] % patch or images.shape[3] % patch:
            raise UserError(f"images of {images.shape[2]}x{images.shape[3]} pixels do not divide into patches of "
                            f"{patch}; resize or crop them")
        images = images.to(self.device)
        if images.is_floating_point():
            # A wrong range would give wrong latents silently. Bytes, the fast way, cannot have one.
            low, high = (float(x) for x in images.aminmax())
            if not (-1e-3 <= low and high <= 1 + 1e-3):
                raise UserError(f"images lie in {low:g}..{high:g}: give uint8 in 0..255 or floating point in 0..1")
            images = images.float() * 255
        elif images.dtype != torch.uint8:
            raise UserError(f"images are {images.dtype}: give uint8 in 0..255 or floating point in 0..1")
        return normalise(images, mean=self.artifact.pixel_mean, std=self.artifact.pixel_std)

    def _ids(self, tokens: Tensor) -> Tensor:
        size = known(self.model.config.text.vocab_size, "model.text.vocab_size")
        whole = not (tokens.is_floating_point() or tokens.dtype == torch.bool)
        if not whole or (tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size):
            raise UserError(f"token ids must be whole numbers from 0 to {size - 1}; use this model's caption tokenizer")
        return tokens.long()

    def _need(self, objective: str, part: str) -> None:
        if objective not in self.model.objectives:
            raise UserError(f"{self.path} has no {part}: it was trained without the {objective} objective")
