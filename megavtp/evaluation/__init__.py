"""Metrics of a tokenizer (zero-shot, retrieval, k-NN and probes, reconstruction, latents) and of sets of images."""

from megavtp.evaluation.report import format_table, write_metrics
from megavtp.evaluation.tokenizer.interface import VTPEvaluated
from megavtp.evaluation.tokenizer.suite import evaluate

__all__ = ["VTPEvaluated", "evaluate", "format_table", "write_metrics"]
