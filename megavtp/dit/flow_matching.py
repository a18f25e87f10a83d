"""Flow matching goes along straight lines from noise to data (arXiv 2210.02747, 2209.03003).

Letters: b samples, C channels.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.config.share import PassShare
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig
from megavtp.parallel.passes import Pass
from megavtp.parallel.pipeline import Runner


def straight_path(data: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return points x_t = t data + (1 - t) noise and velocities data - noise, all (b, C, H, W), for times (b,)."""
    t = times.view(-1, *[1] * (data.ndim - 1))
    return t * data + (1 - t) * noise, data - noise


def flow_matching_terms(velocity: Tensor, target: Tensor, *, samples_total_local: int) -> dict[str, Tensor]:
    """Compute ``mse``, the squared error, and LightningDiT's ``cosine``, 1 - cosine similarity over channels.

    Both are means over samples and positions. ``velocity`` and ``target`` (b, C, H, W) are of some of a rank's
    ``samples_total_local`` samples: over the micro-batches, the terms add up to the rank's means.
    """
    velocity = velocity.float()
    share = len(velocity) / samples_total_local
    cosine = F.cosine_similarity(velocity, target, dim=1, eps=1e-8)
    return {"mse": F.mse_loss(velocity, target) * share, "cosine": (1 - cosine).mean() * share}


class FlowMatchingPass(Pass):
    """This predicts the velocity of noisy latents. Noise, times and dropped conditions come with the batch."""

    name = "flow_matching"
    mode = "velocity"
    weight = 1.0

    def __init__(self, config: CompleteDiTConfig, share: PassShare, device: torch.device):
        self.share, self.device = share, device
        self.term_weights = {"cosine": config.flow_matching.cosine_weight}

    def prepare(self, run: Runner, batch: LatentBatch) -> int:
        self.batch = batch
        self._path = lru_cache(1)(self._path_of)  # a rank that is first and last stage computes it once
        return self.share.micro_batches

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        tensors = {"x": self.batch.latents, "t": self.batch.times, "y": self.batch.conditions}
        if first:
            points, _ = self._path(micro)
            return {"x": points} | {name: self._take(tensors[name], micro) for name in ("t", "y")}
        return {name: tensor[self.share.rows(micro)].to("meta") for name, tensor in tensors.items()}

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        _, target = self._path(micro)
        return flow_matching_terms(outputs, target, samples_total_local=self.share.local)

    def _path_of(self, micro: int) -> tuple[Tensor, Tensor]:
        batch = self.batch
        return straight_path(*(self._take(x, micro) for x in (batch.latents, batch.noise, batch.times)))

    def _take(self, x: Tensor, micro: int) -> Tensor:
        return x[self.share.rows(micro)].to(self.device, non_blocking=True)
