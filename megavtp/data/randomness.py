"""Random generators that are pure functions of their purpose.

Every draw comes from ``generator(seed, purpose, step, position, ...)``, never from the rank, the worker, the world size
or the order of calls, so a run continues bit for bit on any number of processes.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def stable_hash(seed: int, *tags: int | str) -> int:
    """Return a 128-bit integer from a seed and tags, the same in every process and Python version (unlike ``hash``)."""
    # repr distinguishes types (1 is not "1") and quotes strings, so two different tag lists never have the same text
    text = repr((int(seed), *(tag if isinstance(tag, str) else int(tag) for tag in tags)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, *tags: int | str) -> np.random.Generator:
    """Return a new NumPy generator for these tags: Philox, which is cheap to create; its key is the hash."""
    key: Any = _Key(stable_hash(seed, *tags))  # NumPy's type stubs name no sequence of seeds but its own
    return np.random.Generator(np.random.Philox(key))


class _Key(ISeedSequence):
    """Gives Philox its key. ``Philox(key=...)`` makes the same generator, but asks the system for a seed first, which
    it drops; that takes longer than all the rest."""

    def __init__(self, key: int):
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        return np.frombuffer(self._key.to_bytes(16, "little"), "<u8")
