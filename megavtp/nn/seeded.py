"""A random generator can be a pure function of a name."""

import hashlib

import torch


def named_generator(name: str) -> torch.Generator:
    """Make a fresh CPU generator seeded by ``name``, the same in every process."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
