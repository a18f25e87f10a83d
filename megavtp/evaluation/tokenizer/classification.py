"""Images are classified without training: by the embeddings of their classes' names, or by their nearest neighbours.

The first is CLIP's zero-shot classification (arXiv 2103.00020), the second DINO's weighted k-nearest-neighbour
classification on frozen features (arXiv 2104.14294, section 4.1).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.data.captions import CaptionTokenizer
from megavtp.errors import UserError
from megavtp.evaluation.ranking import knn_predict, match_rank, recall
from megavtp.evaluation.tokenizer.interface import VTPEvaluated
from megavtp.evaluation.tokenizer.labels import blind_accuracy, first_seen_ids, label_values, read_labels, readable
from megavtp.parallel.collectives import all_gather
from megavtp.parallel.mesh import Mesh


def read_templates(path: Path) -> tuple[str, ...]:
    """Read sentences with "{}" for the name of a class, one a line. UserError: there is none, or one without it."""
    try:
        templates = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read templates: {error}") from None
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        told = f"{wrong[0]!r} has no {{}}, the place of the class name" if wrong else "is empty"
        raise UserError(f"{path}: {told}; give one sentence a line, such as: a photo of a {{}}.")
    return templates


def class_embeddings(
    model: VTPEvaluated, tokenizer: CaptionTokenizer, names: Sequence[str], templates: Sequence[str], *,
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
    model: VTPEvaluated, tokenizer: CaptionTokenizer, images: Tensor, meta: Sequence[dict[str, Any]], field: str,
    templates: Sequence[str], *, batch_size: int, mesh: Mesh, device: torch.device,
) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy on the label ``field`` over the classes that occur, at least two, else none.

    ``images`` (n, E) are L2-normalised, on ``device``. The chance level is that of the best answer without the image.
    """
    labels = read_labels(meta, field)
    if labels is None or any(name.isdigit() for name in labels.names):  # a class number is no prompt
        return {}
    texts = class_embeddings(model, tokenizer, labels.names, templates, batch_size=batch_size, mesh=mesh, device=device)
    ids = labels.ids.to(device)
    ranks = match_rank(images[labels.rows.to(device)], texts, ids, torch.arange(len(texts), device=device))
    metrics: dict[str, float] = {}
    for k in (1, 5):
        if k < len(labels.names):
            metrics[f"zero_shot/{field}_top{k}"] = recall(ranks, k)
            metrics[f"chance/zero_shot/{field}_top{k}"] = blind_accuracy(labels.ids, k)
    return metrics


def knn_accuracy(
    features: Tensor, meta: Sequence[dict[str, Any]], field: str, k: int,
    train: tuple[Tensor, Sequence[dict[str, Any]]] | None = None,
) -> dict[str, float]:
    """Compute top-1 accuracy on the label ``field`` of test ``features`` (n, D); empty if the labels are missing.

    ``train`` has features and metadata of training samples, which vote; a test class without any counts as missed.
    Without it, other test samples vote: those of another "style" if the metadata has one, so that the style does not
    give the answer away; else all but the sample itself.
    """
    labels = read_labels(meta, field)
    if labels is None:
        return {}
    device = features.device
    queries, ids = features[labels.rows.to(device)], labels.ids.to(device)
    if train is None:
        style = read_labels([meta[row] for row in labels.rows.tolist()], "style")
        each = torch.arange(len(labels.rows))
        group = (each if style is None or len(style.rows) < len(each) else style.ids).to(device)
        predicted = knn_predict(queries, queries, ids, len(labels.names), k, group, group)
    else:
        bank, bank_meta = train
        rows, values = label_values(bank_meta, field)
        if not rows:
            return {}
        all_ids = first_seen_ids(labels.names + values)  # test classes keep their ids, and others follow
        bank_ids = all_ids[len(labels.names) :].to(device)
        predicted = knn_predict(queries, bank[torch.tensor(rows, device=device)], bank_ids, int(all_ids.max()) + 1, k)
    return {
        f"knn/{field}_top1": (predicted == ids).double().mean().item(),
        f"chance/knn/{field}_top1": blind_accuracy(labels.ids, 1),
    }
