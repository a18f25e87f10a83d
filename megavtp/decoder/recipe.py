"""The recipe of the second stage: reconstruction alone, with an adversarial term if asked for, moves the decoder."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.store import Checkpoint
from megavtp.config.precision import compute_dtype
from megavtp.config.sizes import ResolvedConfig, adversarial_starts
from megavtp.decoder.adversary import Adversary
from megavtp.decoder.passes import AdversarialDecoderPass, DecoderPass, DiscriminatorPass
from megavtp.models.discriminator import Discriminator
from megavtp.models.feature_networks import FeatureNetwork, OwnFeatures, PixelFeatures, timm_features
from megavtp.models.second_stage import SecondStageVTP
from megavtp.nn.block import Block
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.passes import Pass
from megavtp.pretraining.recipe import Pretraining

_TRUNK = "trunk."


class DecoderTraining(Pretraining):
    """The pixel decoder on the latents of a frozen encoder, over pre-training's data."""

    features: FeatureNetwork | None = None

    def open(self) -> None:
        super().open()
        if self.config.objectives.adversarial.weight > 0:
            # Pipeline ranks before the last compute none of them, but ask for their widths.
            device = self.device if self.mesh.is_last_stage else torch.device("meta")
            self.features = build_features(self.config, device)
        if isinstance(self.features, OwnFeatures) and self.mesh.is_last_stage and self._initial:
            self.features.load(_of_trunk(self._initial), self.device)

    def build(self) -> None:
        kind = model_kind(self.config, self.features)
        self.build_as(kind, (Block, Discriminator), self.perceptual, self.features)

    def passes(self) -> list[Pass]:
        return build_passes(self.config, self.share, self.mesh, self.device, self.perceptual, self.features)

    def follow(self, step: int) -> float:
        return 1 - self.config.objectives.reconstruction.decoder_momentum

    def is_frozen(self, step: int, group: dict[str, Any]) -> bool:
        """The discriminator is frozen until it starts."""
        return group["tower"] == "discriminator" and step < adversarial_starts(self.config)[0]

    def resumed(self, checkpoint: Checkpoint) -> None:
        """The discriminator's features are those of the encoder that the checkpoint has."""
        if isinstance(self.features, OwnFeatures) and self.mesh.is_last_stage:
            names = [name.removeprefix("model/") for name in checkpoint.names if name.startswith(f"model/{_TRUNK}")]
            self.features.load(_of_trunk({name: checkpoint.tensor(f"model/{name}") for name in names}), self.device)


def _of_trunk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors by their names in it."""
    return {name.removeprefix(_TRUNK): tensor for name, tensor in tensors.items() if name.startswith(_TRUNK)}


def build_features(config: ResolvedConfig, device: torch.device) -> FeatureNetwork:
    """Make the network that the discriminator reads; the tokenizer's own has no weights yet. Raises UserError."""
    settings, dtype = config.objectives.adversarial, compute_dtype(config.parallel.precision)
    if settings.features == "own":
        return OwnFeatures(config.model, settings.features_size, dtype, config.parallel.attention)
    if settings.features == "pixels":
        return PixelFeatures()
    return timm_features(settings, dtype).to(device)


def model_kind(config: ResolvedConfig, features: FeatureNetwork | None) -> Any:
    """Return what makes the model, for ``build_vtp``."""
    return partial(
        SecondStageVTP, widths=None if features is None else features.widths,
        average=config.objectives.reconstruction.decoder_momentum > 0,
    )


def build_passes(
    config: ResolvedConfig, shares: Any, mesh: Mesh, device: torch.device, perceptual: Any,
    features: FeatureNetwork | None,
) -> list[Pass]:
    """Make the decoder's pass and, with ``features``, the discriminator's, which follows it."""
    share = shares.passes["reconstruction"]
    if features is None:
        return [DecoderPass(config, share, mesh, device, perceptual)]
    adversary = Adversary(config, features, mesh, device)
    decoder = AdversarialDecoderPass(config, share, mesh, device, perceptual, adversary)
    return [decoder, DiscriminatorPass(decoder)]
