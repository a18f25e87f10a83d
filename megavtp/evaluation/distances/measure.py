"""Generated images are measured against a reference: gFID or FD-EfficientNet, kernel distance, precision, recall.

The first needs streamed moments of all images' features, the others the features themselves of a part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megavtp.arithmetic import ceil_div
from megavtp.errors import UserError
from megavtp.evaluation.distances import feature_sets
from megavtp.evaluation.distances.efficientnet import load_efficientnet
from megavtp.evaluation.distances.feature_sets import FeatureMoments, FeatureStatistics, FeatureSummary
from megavtp.evaluation.distances.image_sources import ImageSource, StoredSource, open_images
from megavtp.evaluation.distances.kept_features import read_or_make
from megavtp.evaluation.distances.network import INCEPTION, FeatureNetwork, Inception, metric_name
from megavtp.evaluation.distances.npz_file import holds_images, read_statistics
from megavtp.evaluation.distances.timm_vit import TimmViT
from megavtp.evaluation.gathering import gather_rows
from megavtp.parallel.collectives import broadcast_object, together
from megavtp.parallel.looking import from_first
from megavtp.parallel.mesh import SINGLE, Mesh

# Features kept for the kernel distance and for precision and recall, whose work grows with the square of this. The
# papers use as many; those of Inception take 410 MB.
MAX_KEPT = 50_000


def load_network(
    inception: str | Path | None, device: torch.device | str, timm: Sequence[str] | None = None
) -> FeatureNetwork:
    """Load FID's Inception if its weights are given, a ViT if ``timm`` has its name and its weights, else
    EfficientNet-Lite0. Raises ``UserError``."""
    if timm is not None:
        name, weights = timm
        return TimmViT(name, weights, device)
    return load_efficientnet(device) if inception is None else Inception(inception, device)


def summarise(
    source: ImageSource, network: FeatureNetwork, *, batch_size: int, mesh: Mesh, device: torch.device, title: str = ""
) -> FeatureSummary:
    """Run ``network`` over all images of ``source`` in a collective call, with the same result on every rank.

    Which features are kept depends on the images' numbers alone, not on batch size or process count. ``UserError`` on
    all ranks if one cannot read its share or there are fewer than two images.
    """
    stride = ceil_div(len(source), MAX_KEPT)
    hidden = True if mesh.rank or not title else None  # None: unless the first rank runs in a terminal

    def own_share() -> tuple[FeatureMoments, Tensor, Tensor]:
        moments = FeatureMoments(network.dims, device)
        numbers, kept = [torch.empty(0, dtype=torch.long)], [torch.empty(0, network.dims, device=device)]
        with tqdm(total=len(source), desc=title, unit="img", disable=hidden) as bar:
            for index, images in source.batches(batch_size, mesh.dp_rank, mesh.dp):
                features = network(images.to(device, non_blocking=True))
                moments.update(features)
                keep = index % stride == 0
                numbers.append(index[keep])
                kept.append(features[keep.to(device)])
                bar.update(min(len(index) * mesh.dp, len(source) - bar.n))
        return moments, torch.cat(numbers), torch.cat(kept)

    moments, numbers, kept = together(own_share)
    statistics = moments.statistics(mesh)
    numbers = gather_rows(numbers, mesh, device)
    order = torch.argsort(numbers)
    return FeatureSummary(statistics, gather_rows(kept, mesh, device)[order].to(device), numbers[order])


@dataclass(frozen=True)
class Reference:
    """Has images, or given statistics of them, or both as ADM's files do. Notes tell what was not used."""

    images: StoredSource | None
    statistics: FeatureStatistics | None = None
    notes: tuple[str, ...] = ()


def open_reference(path: str | Path, network: FeatureNetwork, size: int, limit: int | None = None) -> Reference:
    """Open a folder of images or shards, or an .npz file with ``arr_0``, with ``mu`` and ``sigma``, or with all.

    All ranks do so together. Images are cropped to ``size``, that of the samples. The Frechet distance uses a file's
    statistics; those of another network are ignored if there are images, else refused. Raises ``UserError``.
    """
    path = Path(path)
    if not from_first(lambda: path.suffix == ".npz" and path.is_file()):
        return Reference(open_images(path, size, limit))
    images = open_images(path, size, limit) if from_first(lambda: holds_images(path)) else None
    try:
        statistics = read_statistics(path, network.made_by, network.dims)
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
    ``made`` has the features of the samples, ``real`` those of the reference if it has images.
    """

    metrics: dict[str, float]
    reference: FeatureStatistics
    compare: dict[str, dict[str, float]]
    skipped: dict[str, str]
    notes: list[str]
    made: FeatureSummary
    real: FeatureSummary | None


def measure_generation(
    samples: ImageSource, reference: Reference, network: FeatureNetwork, *, batch_size: int = 64, seed: int = 0,
    mesh: Mesh = SINGLE, device: torch.device | str = "cpu", compare: Mapping[str, ImageSource] | None = None,
    kept: Path | None = None,
) -> GenerationResult:
    """Measure all distances that the reference allows in a collective call, with the same result on every rank.

    ``seed`` draws the kernel distance's subsets. ``compare`` has other images by name, which are measured against the
    same reference. ``kept`` is a file that keeps the features of the reference's images, or is to keep them. Raises
    ``UserError`` if samples or reference have fewer than two images, or ``kept`` has other features.
    """
    device = torch.device(device)
    summary = partial(summarise, network=network, batch_size=batch_size, mesh=mesh, device=device)
    images = reference.images
    if kept and images is None:
        raise UserError(
            f"{kept} is to keep features of images, but the reference holds statistics alone; leave "
            "--reference-features out, or name a reference with images"
        )
    real = None
    if images is not None:
        make_real = partial(summary, images, title="reference")
        real = read_or_make(kept, _facts_of(images, network), make_real, device, mesh) if kept else make_real()
    made = summary(samples, title="samples")
    statistics = reference.statistics if real is None else reference.statistics or real.statistics
    assert statistics is not None, "a reference without images has statistics"
    statistics = FeatureStatistics(statistics.mean.to(device), statistics.covariance.to(device), statistics.count)
    compare = compare or {}
    others = [summary(source, title=name) for name, source in compare.items()]
    # The eigenvalues take seconds, so one rank computes them rather than all ranks of a machine at once.
    sets = [made, *others] if mesh.rank == 0 else []
    distances = partial(_distances, real=real, reference=statistics, network=network.name, seed=seed)
    (metrics, skipped), *further = broadcast_object(together(lambda: [distances(images) for images in sets]))
    compared = {name: found for name, (found, _) in zip(compare, further)}
    notes = list(reference.notes)
    name = metric_name("frechet", network.name, "generation")
    for what, of in (("samples", made.statistics), ("reference images", statistics)):
        if warning := feature_sets.few_samples_warning(name, what, of):
            notes.append(warning)
    if network.name != INCEPTION:
        notes.append(f"{name} is a distance of {network.title} features, no FID: do not compare it with published FID")
    return GenerationResult(metrics, statistics, compared, skipped, notes, made, real)


def _facts_of(images: StoredSource, network: FeatureNetwork) -> dict[str, str]:
    """Return what decides the features of a reference's images."""
    files = from_first(lambda: images.digest)
    return {"network": network.made_by, "images": str(len(images)), "size": str(images.size), "files": files}


def _distances(
    made: FeatureSummary, real: FeatureSummary | None, reference: FeatureStatistics, network: str, seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    key = partial(metric_name, network=network, of="generation")
    counts = {"samples": made.statistics.count, "reference_samples": reference.count}
    metrics = {name: float(count) for name, count in counts.items() if count is not None}
    metrics[key("frechet")] = feature_sets.frechet_distance(made.statistics, reference)
    others = (key("kernel"), key("precision"), key("recall"))
    if real is None:
        return metrics, dict.fromkeys(others, "the reference holds statistics, but no images")
    kernel = feature_sets.kernel_distance(made.features, real.features, seed=seed)
    metrics[key("kernel")], metrics[key("kernel_std")] = kernel
    try:
        metrics[key("precision")], metrics[key("recall")] = feature_sets.precision_recall(real.features, made.features)
    except UserError as error:
        return metrics, dict.fromkeys(others[1:], str(error))
    return metrics, {}
