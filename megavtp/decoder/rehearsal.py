"""A rehearsal of the decoder's second stage on one rank of a large world."""

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from megavtp.config.precision import compute_dtype
from megavtp.config.schema import Config
from megavtp.config.sizes import ResolvedConfig
from megavtp.data.batch import Batch
from megavtp.decoder import passes
from megavtp.decoder.recipe import DecoderTraining
from megavtp.decoder.validate import validate_decoder
from megavtp.planning.second_stage import features_of, unread
from megavtp.pretraining.rehearsal import WithoutFiles, beside_the_plan, play_pretraining, with_some_vocabulary
from megavtp.training.rehearsal import Played, Rehearsed, as_on_gpus


class _WithoutFiles(WithoutFiles, DecoderTraining):
    """The second stage that reads no file."""

    def build(self) -> None:
        self.features = features_of(self.config, compute_dtype(self.config.parallel.precision))
        if self.features is not None and self.mesh.is_last_stage:
            unread(self.features, self.config.model)
        super().build()

    def batch(self) -> Batch:
        """Make this rank's share of the last step, when both the decoder and the discriminator learn."""
        return replace(super().batch(), step=self.config.train.steps - 1)


def rehearse_decoder(given: Config, world_size: int, rank: int) -> Rehearsed:
    """Check a recipe for a world, play it on one of its ranks, and add what is planned of that rank. UserError."""
    config = as_on_gpus(with_some_vocabulary(validate_decoder(given, world_size)), world_size)
    return beside_the_plan(config, world_size, play_decoder(config, world_size, rank))


def play_decoder(config: ResolvedConfig, world_size: int, rank: int, *, fused_norms: bool = True) -> Played:
    """Play ``config``, validated for the world and with a vocabulary, on one of its ranks."""
    with patch.object(passes, "draw_augmentation", _augmentation):
        return play_pretraining(config, world_size, rank, fused_norms=fused_norms, recipe=_WithoutFiles)


def _augmentation(*, pictures: Sequence[int], **_: object) -> Tensor:
    """Stand in for ``objectives.diff_augment.draw_augmentation``."""
    return torch.empty(len(pictures), 5)
