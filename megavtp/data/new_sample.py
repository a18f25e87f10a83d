"""What a source yields. Kept apart from the writer so that worker processes start without loading torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NewSample:
    """An image-text pair to be written; ``extension`` is one of jpg, png, webp, ``key`` has no dot."""

    key: str
    image: bytes
    extension: str
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A pair of the source that cannot be used."""

    reason: str
    name: str
