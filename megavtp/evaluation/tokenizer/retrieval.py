"""Images and captions retrieve each other, as do two depictions of one concept."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavtp.evaluation.ranking import chance_recall, match_rank, recall
from megavtp.evaluation.tokenizer.labels import first_seen_ids, read_labels


def caption_retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Compute recall at 1, 5 and 10 from image to text and from text to image, with the levels of a random order.

    ``images`` and ``texts`` (n, E) are L2-normalised, row i from sample i. Samples with the same caption have one text:
    it matches each of their images.
    """
    caption_id = first_seen_ids(captions)
    first = torch.from_numpy(np.unique(caption_id.numpy(), return_index=True)[1])  # a sample of each caption
    caption_id, texts = caption_id.to(images.device), texts[first.to(images.device)]
    text_id = torch.arange(len(first), device=images.device)
    one, images_of_text = torch.ones_like(caption_id), torch.bincount(caption_id)
    return _recalls((1, 5, 10), {
        "retrieval/image_to_text": (match_rank(images, texts, caption_id, text_id), one, one * len(first)),
        "retrieval/text_to_image": (
            match_rank(texts, images, text_id, caption_id), images_of_text, torch.full_like(text_id, len(images))
        ),
    })


def cross_style_retrieval(features: Tensor, meta: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Compute recall at 1 and 5 of the same "concept" among the images of every other "style".

    ``features`` (n, E) are compared by their inner product. The result is empty if there are no two styles, or no
    concept is drawn in two. ``name`` is the metric's, before ``_r1``.
    """
    concept, style = read_labels(meta, "concept"), read_labels(meta, "style")
    if concept is None or style is None:
        return {}
    has_both = torch.isin(concept.rows, style.rows)
    rows = concept.rows[has_both]
    concept_id = concept.ids[has_both]
    style_id = style.ids[torch.isin(style.rows, rows)]
    pairs = torch.zeros(len(concept.names), len(style.names), dtype=torch.long)
    pairs.index_put_((concept_id, style_id), torch.ones_like(concept_id), accumulate=True)
    matches = pairs.sum(1)[concept_id] - pairs[concept_id, style_id]
    asked = matches > 0
    if not asked.any():
        return {}
    candidates = len(rows) - pairs.sum(0)[style_id]
    device = features.device
    gallery, concept_id, style_id = features[rows.to(device)], concept_id.to(device), style_id.to(device)
    query = asked.to(device)
    ranks = match_rank(gallery[query], gallery, concept_id[query], concept_id, style_id[query], style_id)
    return _recalls((1, 5), {name: (ranks, matches[asked], candidates[asked])})


def _recalls(ks: Sequence[int], ways: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Return the recall at each of ``ks``, and that of a random order; a way has ranks, matches and candidates (q,)."""
    metrics: dict[str, float] = {}
    for k in ks:
        for name, (ranks, matches, candidates) in ways.items():
            metrics[f"{name}_r{k}"] = recall(ranks, k)
            metrics[f"chance/{name}_r{k}"] = chance_recall(matches, candidates, k)
    return metrics
