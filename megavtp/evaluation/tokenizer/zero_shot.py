"""Zero-shot classification chooses the class of the nearest averaged prompt embedding (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.errors import UserError
from megavtp.evaluation.ranking import match_rank, recall
from megavtp.evaluation.tokenizer.interface import CaptionEncoder, Evaluated
from megavtp.evaluation.tokenizer.labels import blind_accuracy, read_labels, readable
from megavtp.parallel.collectives import all_gather
from megavtp.parallel.mesh import Mesh


def class_embeddings(
    model: Evaluated, tokenizer: CaptionEncoder, names: Sequence[str], templates: Sequence[str], *,
    batch_size: int, mesh: Mesh, device: torch.device,
) -> Tensor:
    """Return the classes' text features (C, E), normalised per template, averaged, and normalised again.

    This is a collective call: the dp ranks share the prompts, and each makes the same number of forwards.
    """
    if not templates or any("{}" not in template for template in templates):
        raise UserError('evaluation.templates: every template needs "{}", the place of the class name')
    prompts = [template.replace("{}", readable(name)) for name in names for template in templates]
    tokens = tokenizer.encode(prompts)
    share = ceil_div(len(prompts), mesh.dp)
    rows = (torch.arange(share) + mesh.dp_rank * share).clamp_max(len(prompts) - 1)  # short ranks repeat the last
    with torch.no_grad():
        own = [model.encode_text(tokens[part].to(device)).float() for part in rows.split(batch_size)]
    features = all_gather(torch.cat(own), mesh, "dp")[: len(prompts)]
    features = F.normalize(features, dim=-1).unflatten(0, (len(names), len(templates)))
    return F.normalize(features.mean(1), dim=-1)


def zero_shot(
    model: Evaluated, tokenizer: CaptionEncoder, images: Tensor, meta: Sequence[dict[str, Any]], field: str,
    templates: Sequence[str], *, batch_size: int, mesh: Mesh, device: torch.device,
) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy on the label ``field`` over the classes that occur, at least two, else none.

    ``images`` (n, E) are L2-normalised, on ``device``. The chance level is that of the best answer without the image.
    """
    labels = read_labels(meta, field)
    if labels is None or any(name.isdigit() for name in labels.names):  # a class number is no prompt
        return {}
    classes = class_embeddings(
        model, tokenizer, labels.names, templates, batch_size=batch_size, mesh=mesh, device=device
    )
    ids = labels.ids.to(device)
    ranks = match_rank(images[labels.rows.to(device)], classes, ids, torch.arange(len(classes), device=device))
    metrics: dict[str, float] = {}
    for k in (1, 5):
        if k < len(labels.names):
            metrics[f"zero_shot/{field}_top{k}"] = recall(ranks, k)
            metrics[f"chance/zero_shot/{field}_top{k}"] = blind_accuracy(labels.ids, k)
    return metrics
