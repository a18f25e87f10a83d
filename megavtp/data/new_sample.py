"""What a source yields. It is separate from the writer so that worker processes start without loading torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NewSample:
    """An image-text pair to be written. ``extension`` is jpg, png or webp; ``key`` has no dot."""

    key: str
    image: bytes
    extension: str
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A pair of the source that cannot be used, and why."""

    reason: str
    name: str
