"""The distances need streamed moments of all images' features, and the features themselves of a part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megavtp.arithmetic import ceil_div
from megavtp.evaluation.distances.efficientnet import load_efficientnet
from megavtp.evaluation.distances.frechet import FeatureMoments, FeatureStatistics
from megavtp.evaluation.distances.image_sources import ImageSource, NumberedImages
from megavtp.evaluation.distances.inception import Inception
from megavtp.evaluation.distances.network import FeatureNetwork
from megavtp.evaluation.gathering import gather_rows
from megavtp.parallel.collectives import together
from megavtp.parallel.mesh import Mesh

# Features kept for the kernel distance and for precision and recall, whose work grows with the square of this. The
# papers use as many; those of Inception take 410 MB.
MAX_KEPT = 50_000


def load_network(inception: str | Path | None, device: torch.device | str) -> FeatureNetwork:
    """Load FID's Inception if its weights are given, else EfficientNet-Lite0. Raises ``UserError``."""
    return load_efficientnet(device) if inception is None else Inception(inception, device)


@dataclass(frozen=True)
class FeatureSummary:
    """Has ``statistics`` of all images, and ``features`` (n, d), float32, of at most ``MAX_KEPT`` of them, in order."""

    statistics: FeatureStatistics
    features: Tensor


def summarise(
    source: ImageSource, network: FeatureNetwork, *, batch_size: int, mesh: Mesh, device: torch.device, title: str = ""
) -> FeatureSummary:
    """Run ``network`` over all images of ``source`` in a collective call, with the same result on every rank.

    Which features are kept depends on the images' numbers alone, not on batch size or process count. ``UserError`` on
    all ranks if one cannot read its share or there are fewer than two images.
    """
    stride = ceil_div(len(source), MAX_KEPT)

    def own_share() -> tuple[FeatureMoments, Tensor, Tensor]:
        moments = FeatureMoments(network.dims, device)
        numbers, kept = [torch.empty(0, dtype=torch.long)], [torch.empty(0, network.dims, device=device)]
        for index, images in _shown(source, batch_size, mesh, title):
            features = network(images.to(device, non_blocking=True))
            moments.update(features)
            keep = index.cpu() % stride == 0
            numbers.append(index.cpu()[keep])
            kept.append(features[keep.to(device)])
        return moments, torch.cat(numbers), torch.cat(kept)

    moments, numbers, kept = together(own_share)
    statistics = moments.statistics(mesh)
    order = torch.argsort(gather_rows(numbers, mesh, device))
    return FeatureSummary(statistics, gather_rows(kept, mesh, device)[order].to(device))


def _shown(source: ImageSource, batch_size: int, mesh: Mesh, title: str) -> Iterator[NumberedImages]:
    """Give this rank's batches; the first rank shows a progress bar if it runs in a terminal."""
    hidden = True if mesh.rank or not title else None
    with tqdm(total=len(source), desc=title, unit="img", disable=hidden) as bar:
        for index, images in source.batches(batch_size, mesh.dp_rank, mesh.dp):
            yield index, images
            bar.update(min(len(index) * mesh.dp, len(source) - bar.n))
