"""Linear probes of a tokenizer: how well a linear classifier names the classes from what the frozen encoder gives.

``latents`` are those after the bottleneck, as in the VTP paper's scaling figures; ``features`` are the encoder's own,
as DINOv2 probes them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from megavtp.data.workers import progress
from megavtp.evaluation.probes import logistic, sweep
from megavtp.evaluation.probes.labelled import ProbeLabels
from megavtp.evaluation.tokenizer.collect import Table
from megavtp.evaluation.tokenizer.interface import VTPEvaluated

PROBES = ("latents", "features")
_BLOCKS = 4  # whose class tokens the larger heads read
_LATENTS, _FEATURES = "probe/latents", "probe/features"  # columns of a table


def probed_blocks(depth: int) -> int:
    """Return how many of the encoder's ``depth`` last blocks are probed."""
    return min(_BLOCKS, depth)


def extraction(
    model: VTPEvaluated, probes: Collection[str], pixels: Tensor, latents: Tensor | None = None
) -> dict[str, Tensor]:
    """Return columns of normalised images (b, 3, H, W): the class token as "features" (b, D), and what ``probes`` read.

    ``latents`` (b, C, h, w) are those of the images, if they are known already.
    """
    values: dict[str, Tensor] = {}
    if "latents" in probes:
        values[_LATENTS] = (model.encode(pixels) if latents is None else latents).flatten(2)
    if "features" not in probes:
        return values | {"features": model.features(pixels)}
    tokens = model.last_blocks(pixels, probed_blocks(model.depth))
    mean_patch = tokens[-1][1].mean(1)
    values[_FEATURES] = torch.cat([*(class_token for class_token, _ in tokens), mean_patch], 1)
    return values | {"features": tokens[-1][0]}


def probe_metrics(
    train: Table, test: Table, labels: Mapping[str, ProbeLabels], probes: Collection[str], depth: int,
    device: torch.device, *, details: dict[str, Any], quiet: bool = True,
) -> dict[str, float]:
    """Compute top-1 accuracy of each probe on each label field, and that of the best answer without the image.

    The tables have the columns of ``extraction``; ``details`` gets the head that was picked, in words.
    """
    jobs = [(name, field) for name in _WAYS if _WAYS[name][0] in probes for field in labels]
    metrics: dict[str, float] = {}
    for name, field in progress(iter(jobs), len(jobs), "probes", quiet):
        source, view, probe = _WAYS[name]
        told, asked = (view(table.columns[f"probe/{source}"]).to(device) for table in (train, test))
        if told.isfinite().all() and asked.isfinite().all():
            predicted, details[f"probe/{name}/{field}"] = probe(told, asked, probed_blocks(depth), labels[field])
        else:  # a diverged model names no class
            predicted = torch.full_like(labels[field].test_ids, -1)
        metrics[f"probe/{name}/{field}_top1"] = labels[field].accuracy(predicted)
        metrics[f"chance/probe/{name}/{field}_top1"] = labels[field].chance
    return metrics


def _logistic(train: Tensor, test: Tensor, blocks: int, labels: ProbeLabels) -> tuple[Tensor, str]:
    return logistic.probe(train, test, labels)


# By metric: the probe it belongs to, what it reads of the probe's column, and its classifier.
_WAYS: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, int, ProbeLabels], Any]]] = {
    "latents": ("latents", lambda column: column.flatten(1), _logistic),
    "latents_mean": ("latents", lambda column: column.mean(2), _logistic),
    "features": ("features", lambda column: column, sweep.probe),
}
