"""Whether a checkpoint is a DiT's or a tokenizer's."""

from __future__ import annotations

from megavtp.checkpoint.reading import Checkpoint

FACTS = "dit"  # of a DiT's meta data: {"visual_tokenizer": ..., "classes": names or None}


def is_dit(checkpoint: Checkpoint) -> bool:
    return FACTS in checkpoint.meta
