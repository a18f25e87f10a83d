"""The Frechet distance of two sets of features beside other implementations: moments and distance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks.comparisons.comparison import Pair, Setting
from megavtp.evaluation.distances.feature_sets import frechet_distance, statistics_of

Features = np.ndarray  # (n, d) float32


@contextmanager
def frechet(setting: Setting, distance_by: Callable[[], Callable[[Features, Features], float]]) -> Iterator[Pair]:
    """``distance_by()`` imports the rival and gives its function; all of them compute on the CPU, but ours."""
    theirs = distance_by()
    dims = setting.size(64, 1280, 2048)  # of EfficientNet's features and of Inception's
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(dims, dims, generator=draw) / dims**0.5
    x, y = torch.randn(2, 4 * dims, dims, generator=draw)
    sets = [x @ mix, y @ mix.T + 0.1]
    arrays = [features.numpy() for features in sets]
    on_device = [features.to(setting.device) for features in sets]

    def by_us() -> float:
        return frechet_distance(*map(statistics_of, on_device))

    def by_rival() -> float:
        return theirs(*arrays)

    ours, other = by_us(), by_rival()
    yield Pair(
        f"2 x {4 * dims:,} features of {dims:,} dimensions", by_us, by_rival, abs(ours - other) / other,
        counts_memory=False,
    )


def torch_fidelity() -> Callable[[Features, Features], float]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def distance(x: Features, y: Features) -> float:
        statistics = [fid_features_to_statistics(torch.from_numpy(features)) for features in (x, y)]
        return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    return distance


def pytorch_fid() -> Callable[[Features, Features], float]:
    from pytorch_fid.fid_score import calculate_frechet_distance

    def distance(x: Features, y: Features) -> float:
        return calculate_frechet_distance(*(m for f in (x, y) for m in (np.mean(f, axis=0), np.cov(f, rowvar=False))))

    return distance
