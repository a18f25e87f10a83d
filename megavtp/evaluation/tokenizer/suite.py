"""This computes all metrics of one model on one data set."""

import logging
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.config.schema import EvaluationConfig
from megavtp.data.captions import CaptionTokenizer
from megavtp.data.loader import EvalDataset
from megavtp.evaluation.distances.feature_sets import few_samples_warning, frechet_distance, statistics_of
from megavtp.evaluation.distances.network import FeatureNetwork, exact_convolutions, metric_name
from megavtp.evaluation.probes.labelled import LABEL_FIELDS, probe_labels
from megavtp.evaluation.probes.linear import extraction, probe_metrics
from megavtp.evaluation.tokenizer.classification import knn_accuracy, zero_shot
from megavtp.evaluation.tokenizer.collect import Extract, Table, collect
from megavtp.evaluation.tokenizer.interface import Perceptual, VTPEvaluated
from megavtp.evaluation.tokenizer.reconstruction import flat_psnr, psnr, ssim
from megavtp.evaluation.tokenizer.retrieval import caption_retrieval, cross_style_retrieval
from megavtp.evaluation.tokenizer.spectrum import Moments, spectrum_metrics
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.pixels import denormalise, normalise

logger = logging.getLogger(__name__)

_REAL, _SHOWN = "frechet/real", "frechet/shown"  # columns of features
_MOMENTS = "latents"  # of which only sums are kept


def evaluate(
    model: VTPEvaluated, test_set: EvalDataset, train_set: EvalDataset | None, config: EvaluationConfig,
    mesh: Mesh = SINGLE, *, tokenizer: CaptionTokenizer, device: torch.device | str = "cpu",
    perceptual: Mapping[str, Perceptual] | None = None, skipped: dict[str, str] | None = None,
    frechet: FeatureNetwork | None = None, probes: Collection[str] = (), details: dict[str, Any] | None = None,
    quiet: bool = True,
) -> dict[str, float]:
    """Compute every metric that model and data allow in a collective call, with the same result on every rank.

    Accuracies and recalls are fractions of 1, PSNR is in dB. The metric ``chance/X`` is what an answer without the
    model reaches on ``X``. Metrics come from per-sample values in the data set's order, in float32, or from sums in
    float64, so they do not depend on batch size or layout.

    Args:
        train_set: its features vote in the k-NN classification; without it, other test samples do. Probes need it.
        perceptual: distances by the names of their metrics, such as ``{"lpips_vgg": lpips}``.
        skipped: gets the metrics that are left out, and why; a reason already there stays.
        frechet: the network for the Frechet distance of the reconstructions to the images; None leaves it out.
        probes: which of ``probes.linear.PROBES`` to train; "latents" needs a model with a pixel decoder.
        details: gets the spectrum of the latents, and the heads that the probes picked.
        quiet: without a progress bar, as inside of a training run, which has a line of its own.
    """
    device = torch.device(device)
    skipped = {} if skipped is None else skipped
    details = {} if details is None else details
    gather = partial(collect, batch_size=config.batch_size, mesh=mesh, device=device, quiet=quiet)
    moments = Moments()
    table = gather(test_set, _extraction(model, perceptual or {}, frechet, probes), totals={_MOMENTS: moments.add})
    metrics: dict[str, float] = {"samples": float(len(table.captions))}
    if "contrastive" in model.objectives:
        images = table.columns["image"].to(device)
        for field in LABEL_FIELDS:
            metrics |= zero_shot(
                model, tokenizer, images, table.meta, field, config.templates, batch_size=config.batch_size, mesh=mesh,
                device=device,
            )
        metrics |= caption_retrieval(images, table.columns["text"].to(device), table.captions)
        metrics |= cross_style_retrieval(images, table.meta, "retrieval/cross_style")
    train = None
    if train_set is not None:
        train = gather(train_set, lambda images, _: extraction(model, probes, normalise(images)))
    metrics |= _knn(table, train, config.knn, device)
    if probes:
        assert train is not None, "probes learn from a train set"
        labels, left_out = probe_labels(train.meta, table.meta)
        skipped |= {f"probe/.../{field}": reason for field, reason in left_out.items()}
        metrics |= probe_metrics(train, table, labels, probes, model.depth, device, details=details, quiet=quiet)
    if "reconstruction" in model.objectives:
        spectrum = moments.spectrum(mesh)
        details["latents/spectrum"] = spectrum.tolist()
        metrics |= spectrum_metrics(spectrum)
    metrics |= {name: x.double().mean().item() for name, x in table.columns.items() if "reconstruction/" in name}
    if frechet is not None and _REAL in table.columns:
        metrics |= _frechet(table, frechet, device, skipped)
    skipped |= _left_out(model, metrics, perceptual) | skipped
    if mesh.rank == 0:
        for name, reason in skipped.items():
            logger.info("evaluation leaves out %s: %s", name, reason)
    return metrics


def _knn(table: Table, train: Table | None, k: int, device: torch.device) -> dict[str, float]:
    """Compute what needs no trained head, as the class token itself is compared."""
    features = F.normalize(table.columns["features"].to(device), dim=-1)
    bank = None if train is None else (train.columns["features"].to(device), train.meta)
    metrics: dict[str, float] = {}
    for field in LABEL_FIELDS:
        metrics |= knn_accuracy(features, table.meta, field, k, bank)
    return metrics | cross_style_retrieval(features, table.meta, "knn/cross_style")


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


def _extraction(
    model: VTPEvaluated, perceptual: Mapping[str, Perceptual], frechet: FeatureNetwork | None, probes: Collection[str]
) -> Extract:
    """Return a function for features of both towers, frozen features and reconstruction errors that the model has."""

    def extract(images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        pixels = normalise(images)
        latents = model.encode(pixels) if "reconstruction" in model.objectives else None
        values = extraction(model, probes, pixels, latents)
        if "contrastive" in model.objectives:
            values["image"] = model.encode_image(pixels)
            values["text"] = model.encode_text(tokens)
        if latents is not None:
            values[_MOMENTS] = latents
            shown = denormalise(model.decode(latents)).clamp(0, 1)
            target = images.float() / 255
            values["reconstruction/psnr"], values["chance/reconstruction/psnr"] = psnr(shown, target), flat_psnr(target)
            values["reconstruction/ssim"] = ssim(shown, target)
            for name, distance in perceptual.items():
                # A few at a time: VGG's first features of 256-pixel images take 16 MiB each.
                pairs = zip((shown * 2 - 1).split(16), (target * 2 - 1).split(16))
                with exact_convolutions():
                    values[f"reconstruction/{name}"] = torch.cat([distance(x, y) for x, y in pairs])
            if frechet is not None:
                values[_REAL] = frechet(images)
                values[_SHOWN] = frechet(shown.mul(255).round_().to(torch.uint8))  # as an image file would hold it
        return values

    return extract


def _left_out(model: VTPEvaluated, metrics: Mapping[str, float], perceptual: Mapping | None) -> dict[str, str]:
    """Tell why metrics that a reader may miss are not there."""
    reasons: dict[str, str] = {}
    no_classes = f"no {' / '.join(LABEL_FIELDS)} with two or more named classes in the samples' metadata"
    if "contrastive" not in model.objectives:
        reasons["zero_shot, retrieval"] = "the model has no text tower (contrastive objective off)"
    elif not any(name.startswith("zero_shot/") for name in metrics):
        reasons["zero_shot"] = no_classes
    if not any(name.startswith("knn/") for name in metrics):
        reasons["knn"] = no_classes
    if "reconstruction" not in model.objectives:
        reasons["reconstruction, latents"] = "the model has no pixel decoder (reconstruction objective off)"
    elif not perceptual:
        reasons["reconstruction/lpips"] = "no perceptual network is available"
    return reasons
