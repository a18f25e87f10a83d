"""This computes all metrics of one model on one data set."""

import logging
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.config.schema import EvaluationConfig
from megavtp.data.captions import CaptionTokenizer
from megavtp.data.loader import EvalDataset
from megavtp.evaluation.distances.feature_sets import few_samples_warning, frechet_distance, statistics_of
from megavtp.evaluation.distances.network import FeatureNetwork, metric_name
from megavtp.evaluation.tokenizer.classification import knn_accuracy, zero_shot
from megavtp.evaluation.tokenizer.collect import Probe, Table, collect
from megavtp.evaluation.tokenizer.interface import Perceptual, VTPEvaluated
from megavtp.evaluation.tokenizer.reconstruction import flat_psnr, psnr, ssim
from megavtp.evaluation.tokenizer.retrieval import caption_retrieval, cross_style_retrieval
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.pixels import denormalise, normalise

logger = logging.getLogger(__name__)

_REAL, _SHOWN = "frechet/real", "frechet/shown"  # columns of features
_LABEL_FIELDS = ("label", "subgroup", "group")  # of the samples' metadata; the ones that occur are used


def evaluate(
    model: VTPEvaluated, test_set: EvalDataset, train_set: EvalDataset | None, config: EvaluationConfig,
    mesh: Mesh = SINGLE, *, tokenizer: CaptionTokenizer, device: torch.device | str = "cpu",
    perceptual: Mapping[str, Perceptual] | None = None, skipped: dict[str, str] | None = None,
    frechet: FeatureNetwork | None = None, quiet: bool = True,
) -> dict[str, float]:
    """Compute every metric that model and data allow in a collective call, with the same result on every rank.

    Accuracies and recalls are fractions of 1, PSNR is in dB. The metric ``chance/X`` is what an answer without the
    model reaches on ``X``. Metrics come from per-sample values in the data set's order, in float32, so they do not
    depend on batch size or layout.

    Args:
        train_set: its features vote in the k-NN classification; without it, other test samples do.
        perceptual: distances by the names of their metrics, such as ``{"lpips_vgg": lpips}``.
        skipped: gets the metrics that are left out, and why; a reason already there stays.
        frechet: the network for the Frechet distance of the reconstructions to the images; None leaves it out.
        quiet: without a progress bar, as inside of a training run, which has a line of its own.
    """
    device = torch.device(device)
    skipped = {} if skipped is None else skipped
    gather = partial(collect, batch_size=config.batch_size, mesh=mesh, device=device, quiet=quiet)
    table = gather(test_set, _probe(model, perceptual or {}, frechet))
    metrics: dict[str, float] = {"samples": float(len(table.captions))}
    if "contrastive" in model.objectives:
        images = table.columns["image"].to(device)
        for field in _LABEL_FIELDS:
            metrics |= zero_shot(
                model, tokenizer, images, table.meta, field, config.templates, batch_size=config.batch_size, mesh=mesh,
                device=device,
            )
        metrics |= caption_retrieval(images, table.columns["text"].to(device), table.captions)
        metrics |= cross_style_retrieval(images, table.meta, "retrieval/cross_style")
    train = None
    if train_set is not None:
        seen = gather(train_set, lambda images, _: {"features": model.features(normalise(images))})
        train = seen.columns["features"].to(device), seen.meta
    # These need no trained head: the class token itself is compared.
    features = F.normalize(table.columns["features"].to(device), dim=-1)
    for field in _LABEL_FIELDS:
        metrics |= knn_accuracy(features, table.meta, field, config.knn, train)
    metrics |= cross_style_retrieval(features, table.meta, "knn/cross_style")
    metrics |= {name: x.double().mean().item() for name, x in table.columns.items() if "reconstruction/" in name}
    if frechet is not None and _REAL in table.columns:
        metrics |= _frechet(table, frechet, device, skipped)
    skipped |= _left_out(model, metrics, perceptual) | skipped
    if mesh.rank == 0:
        for name, reason in skipped.items():
            logger.info("evaluation leaves out %s: %s", name, reason)
    return metrics


def _frechet(table: Table, network: FeatureNetwork, device: torch.device, skipped: dict[str, str]) -> dict[str, float]:
    """Compute rFID with Inception or FD-EfficientNet with EfficientNet; fewer than two images have none."""
    name = metric_name("frechet", network.name, "reconstruction")
    if len(table.captions) < 2:
        skipped[name] = "one image has no covariance"
        return {}
    real, shown = (statistics_of(table.columns[column].to(device)) for column in (_REAL, _SHOWN))
    if warning := few_samples_warning(name, "images", real):
        logger.warning("%s", warning)
    return {name: frechet_distance(shown, real)}


def _probe(model: VTPEvaluated, perceptual: Mapping[str, Perceptual], frechet: FeatureNetwork | None) -> Probe:
    """Return a probe for features of both towers, frozen features and reconstruction errors that the model has."""

    def probe(images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        pixels = normalise(images)
        values = {"features": model.features(pixels)}
        if "contrastive" in model.objectives:
            values["image"] = model.encode_image(pixels)
            values["text"] = model.encode_text(tokens)
        if "reconstruction" in model.objectives:
            shown = denormalise(model.reconstruct(pixels).float()).clamp(0, 1)
            target = images.float() / 255
            values["reconstruction/psnr"], values["chance/reconstruction/psnr"] = psnr(shown, target), flat_psnr(target)
            values["reconstruction/ssim"] = ssim(shown, target)
            for name, distance in perceptual.items():
                # A few at a time: VGG's first features of 256-pixel images take 16 MiB each.
                pairs = zip((shown * 2 - 1).split(16), (target * 2 - 1).split(16))
                values[f"reconstruction/{name}"] = torch.cat([distance(x, y) for x, y in pairs])
            if frechet is not None:
                values[_REAL] = frechet(images)
                values[_SHOWN] = frechet(shown.mul(255).round_().to(torch.uint8))  # as an image file would hold it
        return values

    return probe


def _left_out(model: VTPEvaluated, metrics: Mapping[str, float], perceptual: Mapping | None) -> dict[str, str]:
    """Tell why metrics that a reader may miss are not there."""
    reasons: dict[str, str] = {}
    no_classes = f"no {' / '.join(_LABEL_FIELDS)} with two or more named classes in the samples' metadata"
    if "contrastive" not in model.objectives:
        reasons["zero_shot, retrieval"] = "the model has no text tower (contrastive objective off)"
    elif not any(name.startswith("zero_shot/") for name in metrics):
        reasons["zero_shot"] = no_classes
    if not any(name.startswith("knn/") for name in metrics):
        reasons["knn"] = no_classes
    if "reconstruction" not in model.objectives:
        reasons["reconstruction"] = "the model has no pixel decoder (reconstruction objective off)"
    elif not perceptual:
        reasons["reconstruction/lpips"] = "no perceptual network is available"
    return reasons
