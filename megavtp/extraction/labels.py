"""Class labels of the samples of shards, from a key of their metadata."""

import reprlib
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megavtp.data.decode import BadSample
from megavtp.data.shards import ShardDataset
from megavtp.errors import UserError
from megavtp.parallel.collectives import all_gather_object
from megavtp.parallel.mesh import Mesh

_MOST_CLASSES = 100_000  # more values, or larger numbers, name samples rather than classes
_KEYS_TOLD = 20


@dataclass(frozen=True)
class Labelling:
    """How metadata become labels. ``key`` of the metadata names the class; if it is None, all labels are 0. The sorted
    ``names`` are those of the labels 0, 1, ...; if they are None, the values of the key are the labels."""

    key: str | None = None
    names: list[str] | None = None

    def of(self, meta: dict[str, Any]) -> int:
        if self.key is None:
            return 0
        value = meta[self.key]
        return value if self.names is None else bisect_left(self.names, value)


@dataclass
class _Found:
    """The values of the key that one process saw."""

    names: set[str] = field(default_factory=set)
    numbers: bool = False
    lacking: int = 0
    first_lacking: str = ""
    keys: Counter[str] = field(default_factory=Counter)


def find_labels(folder: ShardDataset, key: str | None, mesh: Mesh) -> Labelling:
    """Read the metadata of all samples, each process its share; a collective call.

    Names are numbered in alphabetical order, so the labels do not depend on the order of the samples. Raises
    ``UserError``: samples without ``key``, values that are neither all names nor all numbers from 0, or too many.
    """
    if key is None:
        return Labelling()
    found: list[_Found] = all_gather_object(_scan(folder, key, mesh))
    names = set().union(*(part.names for part in found))
    lacking = sum(part.lacking for part in found)
    if lacking:
        first = next(part.first_lacking for part in found if part.lacking)
        keys = sum((part.keys for part in found), Counter[str]())
        others = ", ".join(k for k, _ in keys.most_common(_KEYS_TOLD)) or "none"
        raise UserError(
            f"--label {key}: {lacking} of {len(folder)} samples in {folder.folder} have no such name, nor a whole "
            f"number from 0 to {_MOST_CLASSES - 1} (first: {first}); keys of theirs: {others}"
        )
    if names and any(part.numbers for part in found):
        raise UserError(f"--label {key}: some of its values are names, some numbers; make them all one or the other")
    if len(names) > _MOST_CLASSES:
        raise UserError(f"--label {key} has {len(names)} different values; choose a key that names classes")
    return Labelling(key, sorted(names) if names else None)


def _scan(folder: ShardDataset, key: str, mesh: Mesh) -> _Found:
    """Read this process's samples, which are neighbours, so that few processes read the same file."""
    found = _Found()
    for shard, count in enumerate(folder.shard_counts):
        for row in range(count * mesh.dp_rank // mesh.dp, count * (mesh.dp_rank + 1) // mesh.dp):
            try:
                meta = folder.meta(shard, row)
            except BadSample:
                continue  # the extraction leaves it out
            value = meta.get(key)
            if isinstance(value, str) and value:
                found.names.add(value)
            elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_CLASSES:
                found.numbers = True
            else:
                found.lacking += 1
                found.first_lacking = found.first_lacking or f"{folder.name(shard, row)}: {reprlib.repr(value)}"
                found.keys.update(k for k, v in meta.items() if isinstance(v, str | int))
    return found
