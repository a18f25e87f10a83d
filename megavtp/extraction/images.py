"""The images of a data set, in batches that do not depend on which process encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.data.augment import center_crop
from megavtp.data.decode import BadSample, decode_image
from megavtp.data.loader import LoadedBatch
from megavtp.data.order import cumulated, locate
from megavtp.data.shards import ShardDataset
from megavtp.extraction.labels import Labels


@dataclass(frozen=True)
class ImageBatch(LoadedBatch):
    """A batch of images in the data set's order.

    Attributes:
        images: (b, 3, size, size) uint8; b may be 0. labels: (b,) int64. captions: b texts.
        left_out: "name: reason" of samples that cannot be read.
    """

    images: Tensor
    labels: Tensor
    captions: list[str]
    left_out: list[str]


class ImageBatches:
    """``self[i]`` is the batch of the samples ``ranges[i]``, numbered through all shards of ``folder``.

    An image is reduced and cut to the middle ``size`` pixels, as in the reconstruction protocol.
    """

    def __init__(self, folder: ShardDataset, ranges: Sequence[range], size: int, labels: Labels):
        self.folder, self.ranges, self.size, self.labels = folder, ranges, size, labels
        self._ends = cumulated(folder.shard_counts)

    def __getitem__(self, place: int) -> ImageBatch:
        images, labels, captions, left_out = [], [], [], []
        for number in self.ranges[place]:
            shard, row = locate(self._ends, number)
            try:
                raw = self.folder.read(shard, row)
                images.append(center_crop(decode_image(raw.image), self.size))
            except BadSample as error:
                left_out.append(f"{self.folder.name(shard, row)}: {error}")
                continue
            labels.append(self.labels.of(raw.meta))
            captions.append(raw.caption)
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return ImageBatch(stacked, torch.tensor(labels, dtype=torch.long), captions, left_out)
