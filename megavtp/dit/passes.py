"""The DiT's recipe has one pass, flow matching over a batch of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megavtp.config.share import PassShare
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig
from megavtp.dit.flow_matching import flow_matching_terms, straight_path
from megavtp.parallel.passes import Pass
from megavtp.parallel.pipeline import Runner


class FlowMatchingPass(Pass):
    """This predicts the velocity of noisy latents. Noise, times and dropped conditions come with the batch."""

    name = "flow_matching"
    mode = "velocity"
    weight = 1.0

    def __init__(self, config: CompleteDiTConfig, share: PassShare, device: torch.device):
        self.share, self.device = share, device
        self._last: tuple[int, Tensor, Tensor] | None = None  # the latest micro-batch, its points and velocities
        self.term_weights = {"cosine": config.flow_matching.cosine_weight}

    def prepare(self, run: Runner, batch: LatentBatch) -> int:
        self.batch, self._last = batch, None
        return self.share.micro_batches

    def inputs(self, micro: int) -> dict[str, Any]:
        points, _ = self._path(micro)
        return {"x": points, "t": self._take(self.batch.times, micro), "y": self._take(self.batch.conditions, micro)}

    def later_inputs(self, micro: int) -> dict[str, Any]:
        tensors = {"x": self.batch.latents, "t": self.batch.times, "y": self.batch.conditions}
        return {name: self._rows(tensor, micro).to("meta") for name, tensor in tensors.items()}

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        _, target = self._path(micro)
        return flow_matching_terms(outputs, target, samples_total_local=self.share.local)

    def _path(self, micro: int) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's points and velocities; a rank that is first and last stage computes them once."""
        if self._last is None or self._last[0] != micro:
            batch = self.batch
            made = straight_path(*(self._take(x, micro) for x in (batch.latents, batch.noise, batch.times)))
            self._last = micro, *made
        return self._last[1:]

    def _rows(self, x: Tensor, micro: int) -> Tensor:
        return x[micro * self.share.micro_batch : (micro + 1) * self.share.micro_batch]

    def _take(self, x: Tensor, micro: int) -> Tensor:
        return self._rows(x, micro).to(self.device, non_blocking=True)
