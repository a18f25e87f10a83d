"""Class labels and other categories of a table's samples become integer ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """``rows`` (n,) are the samples with the field; ``ids`` (n,) are positions in the sorted ``names``."""

    rows: Tensor
    ids: Tensor
    names: list[str]


def label_values(meta: Sequence[dict[str, Any]], field: str) -> tuple[list[int], list[str]]:
    """Return the samples whose metadata have a value of ``field``, and the values."""
    rows = [row for row, m in enumerate(meta) if isinstance(m.get(field), str | int) and m[field] != ""]
    return rows, [str(meta[row][field]) for row in rows]


def read_labels(meta: Sequence[dict[str, Any]], field: str) -> Labels | None:
    """Read the values of ``field`` in the samples' metadata; ``None`` unless there are two or more different ones."""
    rows, values = label_values(meta, field)
    names = sorted(set(values))
    if len(names) < 2:
        return None
    position = {name: i for i, name in enumerate(names)}
    return Labels(torch.tensor(rows), torch.tensor([position[v] for v in values]), names)


def first_seen_ids(values: Sequence[str]) -> Tensor:
    """Return the values' ids (n,), numbered in the order of their first appearance."""
    position: dict[str, int] = {}
    return torch.tensor([position.setdefault(value, len(position)) for value in values], dtype=torch.long)


def readable(name: str) -> str:
    """Turn a label into words: "face-smiling" becomes "face smiling"."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def blind_accuracy(ids: Tensor, k: int) -> float:
    """Return the best top-k accuracy without the image, which is the share of the k most frequent classes."""
    counts = torch.bincount(ids).sort(descending=True).values
    return (counts[:k].sum() / len(ids)).item()
