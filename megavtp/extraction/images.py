"""The images of a data set, in batches that do not depend on which process encodes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.data.decode import MAX_PIXELS, BadSample
from megavtp.data.handover import LoadedBatch
from megavtp.data.loader import CroppedSamples
from megavtp.data.shards import ShardDataset
from megavtp.extraction.labels import Labelling


@dataclass(frozen=True)
class ImageBatch(LoadedBatch):
    """A batch of images in the data set's order, which may be empty."""

    images: Tensor  # (b, 3, size, size) uint8
    labels: Tensor  # (b,) int64
    captions: list[str]
    left_out: list[str]  # "name: reason" of each sample that cannot be read


class ImageBatches:
    """``self[i]`` is the batch of the samples ``ranges[i]``, numbered through all shards of ``folder``."""

    def __init__(self, folder: ShardDataset, ranges: Sequence[range], size: int, labels: Labelling):
        self.samples, self.ranges, self.labels = CroppedSamples(folder, size, MAX_PIXELS), ranges, labels

    def __getitem__(self, place: int) -> ImageBatch:
        images, labels, captions, left_out = [], [], [], []
        for number in self.ranges[place]:
            try:
                raw, image = self.samples.read(number)
            except BadSample as error:
                left_out.append(str(error))
                continue
            images.append(image)
            labels.append(self.labels.of(raw.meta))
            captions.append(raw.caption)
        size = self.samples.size
        stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return ImageBatch(stacked, torch.tensor(labels, dtype=torch.long), captions, left_out)
