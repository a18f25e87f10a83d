"""A data set in memory with samples that can be broken, and a small configuration that reads it."""

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from megavtp.config.run import TrainConfig
from megavtp.config.schema import (
    AugmentConfig,
    Config,
    ContrastiveConfig,
    DataConfig,
    ModelConfig,
    ObjectivesConfig,
    ReconstructionConfig,
    SelfDistillationConfig,
)
from megavtp.data.decode import BadSample
from megavtp.data.shards import RawSample


class MemoryDataset:
    """Samples (shard, row) with their own picture and caption. ``broken``: of these the bytes are no image;
    ``unreadable``: of these ``read`` fails."""

    def __init__(self, shard_counts=(11, 23, 6), broken=(), unreadable=()):
        self.shard_counts = tuple(shard_counts)
        self.broken = set(broken)
        self.unreadable = set(unreadable)

    def __len__(self):
        return sum(self.shard_counts)

    def name(self, shard, row):
        return f"shard-{shard:06d}/{row}"

    def read(self, shard, row):
        if (shard, row) in self.unreadable:
            raise BadSample("short read")
        rng = np.random.default_rng([shard, row])
        shape = [(20, 20), (12, 31), (40, 17)][row % 3]
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(file, "PNG")
        data = b"not an image" if (shard, row) in self.broken else file.getvalue()
        return RawSample(str(row), data, f"sample {row} of shard {shard}", {"shard": shard}, self.name(shard, row))


class LengthTokenizer:
    """Characters as ids, padded with zeros to eight."""

    def encode(self, captions):
        codes = [[ord(c) for c in caption[-8:]] for caption in captions]
        return torch.tensor([row + [0] * (8 - len(row)) for row in codes], dtype=torch.long).view(len(captions), 8)


def small_config(contrastive=1.0, ssl=1.0, rec=0.1, batch=16, ssl_batch=8, rec_batch=4, seed=0, **data):
    augment = AugmentConfig(plain_flip=0.5, global_size=32, local_crops=2, local_size=16)
    return Config(
        seed=seed,
        model=ModelConfig(image_size=32, patch_size=8),
        objectives=ObjectivesConfig(
            contrastive=ContrastiveConfig(weight=contrastive),
            self_distillation=SelfDistillationConfig(weight=ssl, batch=ssl_batch),
            reconstruction=ReconstructionConfig(weight=rec, batch=rec_batch),
        ),
        data=replace(DataConfig(streams=4, shuffle_block=4, workers=0, augment=augment), **data),
        train=TrainConfig(batch_size=batch),
    )
