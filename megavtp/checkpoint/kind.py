"""This tells the checkpoint of a DiT from that of a tokenizer."""

from megavtp.checkpoint.reading import Checkpoint

FACTS = "dit"  # key in a DiT's metadata: {"visual_tokenizer": ..., "classes": names or None}


def is_dit(checkpoint: Checkpoint) -> bool:
    return FACTS in checkpoint.meta
