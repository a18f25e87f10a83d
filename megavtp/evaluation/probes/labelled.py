"""Which samples teach a probe's heads, which of them pick one, and which it is asked about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavtp.errors import UserError
from megavtp.evaluation.tokenizer.labels import Labels, blind_accuracy, label_values, read_labels

LABEL_FIELDS = ("label", "subgroup", "group")  # of the samples' metadata; the ones that occur are used
_PART = 5  # of a class's training samples every fifth picks the head

Meta = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ProbeLabels:
    """One label field of both splits. Ids are positions in the sorted names of the training classes.

    Attributes:
        rows, ids: (n,) training samples with the field, and their classes.
        picks: (n,) bool; these training samples pick the head among those that the others taught.
        test_rows, test_ids: (m,) test samples with the field; -1 is a class that training does not have.
        chance: the best accuracy without the image.
    """

    rows: Tensor
    ids: Tensor
    picks: Tensor
    test_rows: Tensor
    test_ids: Tensor
    classes: int
    chance: float

    def accuracy(self, predicted: Tensor) -> float:
        """Return the share of the test samples whose class was ``predicted`` (m,); an unknown class is missed."""
        return ((predicted.cpu() == self.test_ids) & (self.test_ids >= 0)).double().mean().item()


def probe_labels(train: Meta, test: Meta) -> tuple[dict[str, ProbeLabels], dict[str, str]]:
    """Return the labels of each field that can be probed, and for the others that occur the reason why not.

    Raises ``UserError`` if there is no field to probe.
    """
    found: dict[str, ProbeLabels] = {}
    reasons: dict[str, str] = {}
    for field in LABEL_FIELDS:
        labels, asked = read_labels(train, field), read_labels(test, field)
        if labels is None or asked is None:
            continue
        picks = _picks(train, labels)
        if len(labels.ids[picks].unique()) < 2:
            reasons[field] = (
                f"too few training samples a class: {len(labels.rows)} of {len(labels.names)} classes, fewer than two "
                f"of which have {_PART} samples (of different concepts); raise --max-samples, or add samples"
            )
            continue
        position = {name: number for number, name in enumerate(labels.names)}
        test_ids = torch.tensor([position.get(name, -1) for name in label_values(test, field)[1]])
        found[field] = ProbeLabels(
            labels.rows, labels.ids, picks, asked.rows, test_ids, len(labels.names), blind_accuracy(asked.ids, 1)
        )
    if not found and reasons:
        raise UserError("--probe: " + "; ".join(f"{field}: {reason}" for field, reason in reasons.items()))
    if not found:
        names = " / ".join(LABEL_FIELDS)
        raise UserError(
            f"--probe: no {names} with two or more classes in the metadata of both the training and the measured "
            f"samples; write one into the samples' .json, or leave --probe out"
        )
    return found, reasons


def _picks(meta: Meta, labels: Labels) -> Tensor:
    """Mark (n,) every fifth sample of each class. Samples of one "concept", if the metadata tell it, stay together:
    near copies on both sides would favour the head that has learnt its samples by heart."""
    members: list[dict[str | int, int]] = [{} for _ in labels.names]
    marks = []
    for row, label in zip(labels.rows.tolist(), labels.ids.tolist()):
        concept = meta[row].get("concept")
        key = f"{concept}" if isinstance(concept, str | int) else row
        number = members[label].setdefault(key, len(members[label]))
        marks.append(number % _PART == _PART - 1)
    return torch.tensor(marks)
