"""This chooses the samples of a DiT to compare with a reference."""

from collections import Counter
from pathlib import Path

import numpy as np

from megavtp.data.decode import BadSample
from megavtp.data.order import locate
from megavtp.data.shards import ShardDataset, open_dataset, split_folders
from megavtp.dit.checkpoint import StoredDiT
from megavtp.dit.sampling.samples import Sample, in_proportion
from megavtp.errors import UserError


def samples_like(
    reference: str | Path, dit: StoredDiT, count: int, label: str | None, equal: bool = False
) -> list[Sample]:
    """List ``count`` samples of the DiT to compare with ``reference``.

    Classes have equally many samples, as in the papers; with ``label``, they have the proportions that this key of the
    metadata has in the reference's shards, unless they are to be ``equal``. Captions are those of ``count`` images
    spread over the reference's shards. ``UserError`` if shards are needed and there are none, or the DiT does not know
    their labels or captions.
    """
    if count < 2:
        raise UserError(f"--samples {count}: must be at least 2, better 10,000")
    model = dit.config.model
    if model.condition == "class" and label is None:
        return in_proportion([1] * dit.trained_classes, count)
    folder = split_folders(Path(reference)).get("train")
    if folder is None:
        wants = "--label needs their metadata" if label else "this DiT needs their captions"
        raise UserError(f"--reference {reference} is no folder of shards, and {wants}")
    dataset = open_dataset(folder)
    if label is None:
        return _captions(dataset, count)
    if model.condition == "caption":
        raise UserError(f"--label {label}: this DiT takes captions, which the reference gives; leave it out")
    counts = _class_counts(dataset, dit, label)
    return in_proportion([1] * len(counts) if equal else counts, count)


def _captions(dataset: ShardDataset, count: int) -> list[Sample]:
    """List samples of the shards' captions; a repeated caption gives another sample, not the same image."""
    ends = np.cumsum(dataset.shard_counts)
    seen: Counter[str] = Counter()
    samples = []
    for i in range(count):
        try:
            caption = dataset.read(*locate(ends, i * len(dataset) // count)).caption
        except BadSample:
            continue
        if caption:
            samples.append(Sample(caption, seen[caption]))
            seen[caption] += 1
    if len(samples) < 2:
        raise UserError(f"{dataset.folder} has no captions, which this DiT is conditioned on; use shards that have")
    return samples


def _class_counts(dataset: ShardDataset, dit: StoredDiT, label: str) -> list[int]:
    """Count the reference's samples of each of the DiT's classes."""
    values: Counter[str | int | None] = Counter()
    for shard, rows in enumerate(dataset.shard_counts):
        for row in range(rows):
            try:
                value = dataset.meta(shard, row).get(label)
            except BadSample:
                continue  # the reference leaves it out, too
            values[value if isinstance(value, str | int) else None] += 1
    classes = dit.class_values
    if strange := [value for value in values if value not in classes]:
        raise UserError(
            f"--label {label}: the value {strange[0]!r} of {values[strange[0]]} samples in {dataset.folder} is no "
            f"class of this DiT ({', '.join(map(str, list(classes)[:10]))}{', ...' * (len(classes) > 10)})"
        )
    return [values[value] for value in classes]
