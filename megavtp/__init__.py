"""MegaVTP: parallel pre-training of visual tokenizers."""

__version__ = "0.1.0"
