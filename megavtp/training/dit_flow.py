"""The DiT's recipe: flow matching as one pass over a batch of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megavtp.config.dit import DiTConfig
from megavtp.config.share import PassShare
from megavtp.data.latent_batch import LatentBatch
from megavtp.objectives.flow_matching import flow_matching_terms, straight_path
from megavtp.parallel.passes import Pass, Runner


class FlowMatchingPass(Pass):
    """Velocity of noisy latents. Noise, times and dropped conditions come with the batch."""

    name = "flow_matching"
    mode = "velocity"
    weight = 1.0

    def __init__(self, config: DiTConfig, share: PassShare, device: torch.device):
        self.share, self.device = share, device
        self.term_weights = {"cosine": config.flow_matching.cosine_weight}

    def prepare(self, run: Runner, batch: LatentBatch) -> int:
        self.batch = batch
        return self.share.micro_batches

    def inputs(self, micro: int) -> dict[str, Any]:
        rows = slice(micro * self.share.micro_batch, (micro + 1) * self.share.micro_batch)
        take = lambda x: x[rows].to(self.device, non_blocking=True)  # noqa: E731
        times = take(self.batch.times)
        points, self._target = straight_path(take(self.batch.latents), take(self.batch.noise), times)
        return {"x": points, "t": times, "y": take(self.batch.conditions)}

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        return flow_matching_terms(outputs, self._target, samples_total_local=self.share.local)
