"""This chooses the samples of a DiT to compare with a reference."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavtp.data.decode import BadSample
from megavtp.data.order import locate
from megavtp.data.shards import ShardDataset, open_dataset, split_folders
from megavtp.dit.checkpoint import StoredDiT
from megavtp.dit.sampling.samples import Sample, in_proportion, shares
from megavtp.errors import UserError

Label = str | int  # a value of a key of the metadata


@dataclass(frozen=True)
class Wanted:
    """Samples to draw, and the value of the label that each is to show; None without a label."""

    samples: list[Sample]
    shown: list[Label] | None = None


def samples_like(reference: str | Path, dit: StoredDiT, count: int, label: str | None, equal: bool = False) -> Wanted:
    """Choose ``count`` samples of the DiT to compare with ``reference``.

    Classes have equally many samples, as in the papers; with ``label``, they have the proportions that this key of the
    metadata has in the reference's shards, unless they are to be ``equal``. Captions are those of ``count`` images
    spread over the reference's shards, or over each class of the ``label``. ``UserError`` if shards are needed and
    there are none, or the DiT does not know their labels or captions.
    """
    if count < 2:
        raise UserError(f"--samples {count}: must be at least 2, better 10,000")
    captioned = dit.config.model.condition == "caption"
    if not captioned and label is None:
        return Wanted(in_proportion([1] * dit.trained_classes, count))
    folder = split_folders(Path(reference)).get("train")
    if folder is None:
        wants = "this DiT needs their captions" if captioned else "--label needs their metadata"
        raise UserError(f"--reference {reference} is no folder of shards, and {wants}")
    dataset = open_dataset(folder)
    if captioned:
        return _captions(dataset, count, label, equal)
    assert label is not None  # or there would be no need for shards
    counts = _class_counts(dataset, dit, label)
    weights = [1] * len(counts) if equal else counts
    shown = [value for value, number in zip(dit.class_values, shares(weights, count)) for _ in range(number)]
    return Wanted(in_proportion(weights, count), shown)


def _captions(dataset: ShardDataset, count: int, label: str | None, equal: bool) -> Wanted:
    """Choose samples of the shards' captions; a repeated caption gives another sample, not the same image."""
    ends = np.cumsum(dataset.shard_counts)
    rows: Mapping[Label | None, Sequence[int]] = {None: range(len(dataset))}
    if label is not None:
        rows = {value: of for value, of in _rows_by_class(dataset, label).items() if value is not None}
        if not rows:
            raise UserError(f"--label {label}: no sample in {dataset.folder} has it in its metadata")
    seen: Counter[str] = Counter()
    samples: list[Sample] = []
    shown: list[Label] = []
    for (value, of), wanted in zip(rows.items(), shares([1 if equal else len(of) for of in rows.values()], count)):
        for i in range(wanted):
            try:
                caption = dataset.read(*locate(ends, of[i * len(of) // wanted])).caption
            except BadSample:
                continue
            if caption:
                samples.append(Sample(caption, seen[caption]))
                seen[caption] += 1
                shown += [] if value is None else [value]
    if len(samples) < 2:
        raise UserError(f"{dataset.folder} has no captions, which this DiT is conditioned on; use shards that have")
    return Wanted(samples, None if label is None else shown)


def _class_counts(dataset: ShardDataset, dit: StoredDiT, label: str) -> list[int]:
    """Count the reference's samples of each of the DiT's classes."""
    rows, classes = _rows_by_class(dataset, label), dit.class_values
    if strange := [value for value in rows if value not in classes]:
        raise UserError(
            f"--label {label}: the value {strange[0]!r} of {len(rows[strange[0]])} samples in {dataset.folder} is no "
            f"class of this DiT ({', '.join(map(str, list(classes)[:10]))}{', ...' * (len(classes) > 10)})"
        )
    return [len(rows.get(value, ())) for value in classes]


def _rows_by_class(dataset: ShardDataset, label: str) -> dict[Label | None, list[int]]:
    """Return the rows of the images of each value of ``label``, and of those without it."""
    rows: defaultdict[Label | None, list[int]] = defaultdict(list)
    places = ((shard, row) for shard, count in enumerate(dataset.shard_counts) for row in range(count))
    for number, place in enumerate(places):
        with suppress(BadSample):  # the reference leaves it out, too
            value = dataset.meta(*place).get(label)
            rows[value if isinstance(value, str | int) else None].append(number)
    return rows
