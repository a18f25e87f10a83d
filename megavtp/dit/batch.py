"""One rank's share of a DiT's training step is a pure function of (seed, step): latents and all random choices.

Letters: b samples of the share, C channels, h = w positions, E caption features.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megavtp.config.sizes import known
from megavtp.data.handover import LoadedBatch
from megavtp.data.order import SampleOrder, StepOrder
from megavtp.data.randomness import generator
from megavtp.dit.config import CompleteDiTConfig
from megavtp.latents.folder import LatentFolder, LatentSample

_REMEDY = "extract them again with tools/extract_latents.py"


@dataclass(frozen=True)
class LatentBatch(LoadedBatch):
    """A rank's share of a step; with dp ranks in order, concatenation gives the batch of a single process."""

    step: int
    ids: list[str]
    positions: Tensor  # (b,) int64, place in the global batch
    latents: Tensor  # (b, C, h, w) float32, normalised
    noise: Tensor  # (b, C, h, w) float32
    times: Tensor  # (b,) float32 in (0, 1); 0 is noise, 1 is data
    conditions: Tensor  # labels (b,) int64 or caption features (b, E) float32, some dropped


class LatentStepDataset:
    """``self[step]`` is the share of data-parallel rank ``dp_rank`` of ``dp_size`` in that step.

    ``config`` has the sizes of the folder. Raises ``UserError`` if streams, batch and dp_size do not divide, or if all
    candidates for a broken sample are broken too.
    """

    def __init__(self, folder: LatentFolder, config: CompleteDiTConfig, dp_rank: int = 0, dp_size: int = 1):
        self.folder, self.config = folder, config
        order = SampleOrder(folder.shard_counts, config.data.streams, config.data.shuffle_block, config.seed)
        self.order = StepOrder(order, config.train.batch_size, dp_rank, dp_size)

    def __getitem__(self, step: int) -> LatentBatch:
        bad: list[str] = []
        positions = self.order.positions.tolist()
        flips, drops, times, noise = zip(*(self._draw(step, position) for position in positions))
        samples = [
            self.order.read(step, position, partial(self.folder.read, flip=flip), self.folder, bad, _REMEDY)
            for position, flip in zip(positions, flips)
        ]
        return LatentBatch(
            step=step, ids=[sample.id for sample in samples], positions=torch.tensor(positions),
            latents=self.folder.statistics.normalise(torch.stack([sample.latents for sample in samples])),
            noise=torch.from_numpy(np.stack(noise)), times=torch.tensor(times, dtype=torch.float32),
            conditions=self._conditions(samples, torch.tensor(drops)), bad=bad,
        )

    def _draw(self, step: int, position: int) -> tuple[bool, bool, float, np.ndarray]:
        """Draw for one sample whether it is mirrored, whether its condition is dropped, its time and its noise."""
        rng, settings = generator(self.config.seed, "flow", step, position), self.config.flow_matching
        flip, drop = rng.random(2)
        time = 1 / (1 + np.exp(-(settings.time_mu + settings.time_sigma * rng.standard_normal())))
        noise = rng.standard_normal(self.folder.shape, dtype=np.float32)
        return flip < self.config.data.flip, drop < settings.condition_dropout, time, noise

    def _conditions(self, samples: list[LatentSample], drop: Tensor) -> Tensor:
        model = self.config.model
        if model.condition == "class":
            none = known(model.num_classes, "model.num_classes")
            return torch.tensor([sample.label for sample in samples]).masked_fill(drop, none)
        captions = [sample.caption for sample in samples if sample.caption is not None]
        return torch.stack(captions).masked_fill(drop[:, None], 0.0)
