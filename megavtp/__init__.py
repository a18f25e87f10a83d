"""MegaVTP: parallel pre-training of visual tokenizers."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Tokenizer", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Import the tokenizer on first use: every part of the package imports this file, and most need no tokenizer."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("megavtp.tokenizer"), name)
