"""Drawn pictures are recognised: the real pictures that are nearest to each say by a vote which class it shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavtp.errors import UserError
from megavtp.evaluation.distances.image_sources import ShardImages
from megavtp.evaluation.distances.measure import FeatureSummary
from megavtp.evaluation.generation.samples import Label
from megavtp.evaluation.ranking import knn_predict
from megavtp.evaluation.report import CHANCE
from megavtp.evaluation.tokenizer.labels import blind_accuracy, first_seen_ids

METRIC = "generation/class_accuracy"
_LEAST = "generation/class_accuracy_least"
_NEIGHBOURS = 20
_SHOWN = 10  # classes in a note


@dataclass(frozen=True)
class Recognition:
    """The shares of drawn and of real pictures whose class the vote names.

    ``classes`` has, by name, ``drawn`` and ``real`` (these shares) with the numbers of pictures that they are of, the
    class that is least often recognised first.
    """

    metrics: dict[str, float]
    real: dict[str, float]
    classes: dict[str, dict[str, float]]
    notes: list[str]


def recognise(
    shown: Sequence[Label], made: FeatureSummary, images: ShardImages, real: FeatureSummary, label: str
) -> Recognition:
    """Tell of how many drawn pictures, with the features ``made``, the class is recognised among real ``images``.

    ``label`` is the key of the images' metadata with their class, and ``shown`` its value for each of the pictures that
    were to be drawn. Real pictures are classified by the others, as a scale: none votes for itself, nor for another of
    its ``concept`` if all have one. Raises ``UserError`` if there are too few real pictures, or none of a class that
    was drawn.
    """
    metas = images.metadata(real.numbers.tolist())
    labels = [meta.get(label) for meta in metas]
    known = [row for row, value in enumerate(labels) if isinstance(value, str | int)]
    values = sorted({*shown, *(labels[row] for row in known)}, key=lambda value: (isinstance(value, str), value))
    ids = {value: number for number, value in enumerate(values)}
    concepts = [metas[row].get("concept") for row in known]
    own = first_seen_ids([str(concept) for concept in concepts]) if all(concepts) else torch.arange(len(known))
    return vote(
        made.features, torch.tensor([ids[shown[number]] for number in made.numbers.tolist()]),
        real.features[torch.tensor(known, dtype=torch.long, device=real.features.device)],
        torch.tensor([ids[labels[row]] for row in known], dtype=torch.long), own,
        [value if isinstance(value, str) else f"class {value}" for value in values],
    )


def vote(
    drawn: Tensor, drawn_ids: Tensor, real: Tensor, real_ids: Tensor, real_groups: Tensor, names: Sequence[str]
) -> Recognition:
    """Compare the classes ``drawn_ids`` (m,) and ``real_ids`` (n,) of the features ``drawn`` (m, d) and ``real`` (n, d)
    with those that the 20 nearest real ones name. Real pictures of one of ``real_groups`` (n,) do not vote for each
    other; the share of real ones is weighted so that each class counts as much as among the drawn ones.
    """
    if len(real) <= _NEIGHBOURS:
        raise UserError(f"a vote of {_NEIGHBOURS} neighbours needs more labelled real pictures than these {len(real)}")
    drawn_total, real_total = (torch.bincount(ids, minlength=len(names)) for ids in (drawn_ids, real_ids))
    if lacking := [name for name, of, among in zip(names, drawn_total, real_total) if of and not among]:
        raise UserError(f"the reference has no picture of the class {lacking[0]}, which was drawn")
    ids, groups = real_ids.to(real.device), real_groups.to(real.device)
    named = knn_predict(drawn, real, ids, len(names), _NEIGHBOURS).cpu()
    others = knn_predict(real, real, ids, len(names), _NEIGHBOURS, groups, groups).cpu()
    drawn_share, real_share = (
        torch.bincount(own[found == own], minlength=len(names)).double() / total.clamp_min(1)
        for own, found, total in ((drawn_ids, named, drawn_total), (real_ids, others, real_total))
    )
    weights = drawn_total.double() / len(drawn)
    occurring = drawn_total.nonzero()[:, 0]
    order = occurring[torch.argsort(drawn_share[occurring], stable=True)].tolist()
    classes = {
        names[i]: {
            "drawn": float(drawn_share[i]), "drawn_pictures": float(drawn_total[i]), "real": float(real_share[i]),
            "real_pictures": float(real_total[i]),
        }
        for i in order
    }
    metrics = {
        METRIC: float(drawn_share @ weights), CHANCE + METRIC: blind_accuracy(drawn_ids, 1),
        _LEAST: float(drawn_share[order[0]]),
    }
    held_out = {METRIC: float(real_share @ weights), _LEAST: float(real_share[occurring].min())}
    return Recognition(metrics, held_out, classes, _notes(classes))


def _notes(classes: dict[str, dict[str, float]]) -> list[str]:
    shown = [f"{name} {of['drawn']:.2f} (real {of['real']:.2f})" for name, of in list(classes.items())[:_SHOWN]]
    more = ", ..." if len(classes) > _SHOWN else ""
    notes = [f"{METRIC} by class, the least first: {', '.join(shown)}{more}"]
    if few := [name for name, of in classes.items() if of["real_pictures"] < _NEIGHBOURS]:
        notes.append(
            f"{METRIC}: {', '.join(few[:_SHOWN])}{', ...' * (len(few) > _SHOWN)}: fewer real pictures than the "
            f"{_NEIGHBOURS} that vote, so the class is seldom named; give a larger reference"
        )
    return notes
