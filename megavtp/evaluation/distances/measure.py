"""Generated images are measured against a reference: gFID or FD-EfficientNet, kernel distance, precision, recall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from megavtp.errors import UserError
from megavtp.evaluation.distances.features import FeatureSummary, summarise
from megavtp.evaluation.distances.frechet import FeatureStatistics, few_samples_warning, frechet_distance
from megavtp.evaluation.distances.image_sources import ImageSource, open_images
from megavtp.evaluation.distances.kid import kernel_distance
from megavtp.evaluation.distances.network import INCEPTION, FeatureNetwork, metric_name
from megavtp.evaluation.distances.npz_file import holds_images, read_statistics
from megavtp.evaluation.distances.precision_recall import precision_recall
from megavtp.parallel.collectives import broadcast_object, together
from megavtp.parallel.mesh import SINGLE, Mesh


@dataclass(frozen=True)
class Reference:
    """Has images, or given statistics of them, or both as ADM's files do. Notes tell what was not used."""

    images: ImageSource | None
    statistics: FeatureStatistics | None = None
    notes: tuple[str, ...] = ()


def open_reference(path: str | Path, network: FeatureNetwork, size: int, limit: int | None = None) -> Reference:
    """Open a folder of images or shards, or an .npz file with ``arr_0``, with ``mu`` and ``sigma``, or with all.

    Images are cropped to ``size``, that of the samples. The Frechet distance uses a file's statistics; those of another
    network are ignored if there are images, else refused. Raises ``UserError``.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return Reference(open_images(path, size, limit))
    images = open_images(path, size, limit) if holds_images(path) else None
    try:
        statistics = read_statistics(path, network.name, network.dims)
    except UserError as error:
        if images is None:
            raise
        return Reference(images, notes=(f"the statistics in the reference are not used: {error}",))
    if images is None and statistics is None:
        raise UserError(f"{path} holds neither images (arr_0) nor statistics (mu and sigma); name another reference")
    return Reference(images, statistics)


@dataclass(frozen=True)
class GenerationResult:
    """``skipped`` gives the reason for each metric that is not in ``metrics``; ``notes`` are for the reader.

    ``reference`` has its statistics, which a file can keep for further use, ``compare`` the metrics of other images.
    """

    metrics: dict[str, float]
    reference: FeatureStatistics
    compare: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure_generation(
    samples: ImageSource, reference: Reference, network: FeatureNetwork, *, batch_size: int = 64, seed: int = 0,
    mesh: Mesh = SINGLE, device: torch.device | str = "cpu", compare: Mapping[str, ImageSource] | None = None,
) -> GenerationResult:
    """Measure all distances that the reference allows in a collective call, with the same result on every rank.

    Args:
        seed: draws the kernel distance's subsets.
        compare: other images by name, which are measured against the same reference.

    Raises:
        UserError: samples or reference have fewer than two images.
    """
    device = torch.device(device)
    summary = partial(summarise, network=network, batch_size=batch_size, mesh=mesh, device=device)
    made = summary(samples, title="samples")
    real = None if reference.images is None else summary(reference.images, title="reference")
    statistics = reference.statistics if real is None else reference.statistics or real.statistics
    assert statistics is not None, "a reference without images has statistics"
    statistics = FeatureStatistics(statistics.mean.to(device), statistics.covariance.to(device), statistics.count)
    compare = compare or {}
    others = [summary(source, title=name) for name, source in compare.items()]

    def measured() -> list[tuple[dict[str, float], dict[str, str]]]:
        return [_distances(one, real, statistics, network.name, seed) for one in (made, *others)]

    # The eigenvalues take seconds, so one rank computes them rather than all ranks of a machine at once.
    (metrics, skipped), *further = broadcast_object(together(lambda: measured() if mesh.rank == 0 else None))
    compared = {name: found for name, (found, _) in zip(compare, further)}
    notes = list(reference.notes)
    name = metric_name("frechet", network.name, "generation")
    for what, of in (("samples", made.statistics), ("reference images", statistics)):
        if warning := few_samples_warning(name, what, of):
            notes.append(warning)
    if network.name != INCEPTION:
        notes.append(f"{name} is a distance of {network.title} features, no FID: do not compare it with published FID")
    return GenerationResult(metrics, statistics, compared, skipped, tuple(notes))


def _distances(
    made: FeatureSummary, real: FeatureSummary | None, reference: FeatureStatistics, network: str, seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    key = partial(metric_name, network=network, of="generation")
    counts = {"samples": made.statistics.count, "reference_samples": reference.count}
    metrics = {name: float(count) for name, count in counts.items() if count is not None}
    metrics[key("frechet")] = frechet_distance(made.statistics, reference)
    others = (key("kernel"), key("precision"), key("recall"))
    if real is None:
        return metrics, dict.fromkeys(others, "the reference holds statistics, but no images")
    metrics[key("kernel")], metrics[key("kernel_std")] = kernel_distance(made.features, real.features, seed=seed)
    try:
        metrics[key("precision")], metrics[key("recall")] = precision_recall(real.features, made.features)
    except UserError as error:
        return metrics, dict.fromkeys(others[1:], str(error))
    return metrics, {}
