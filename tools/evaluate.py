"""Evaluate a checkpoint: zero-shot, retrieval, k-NN on frozen features, reconstruction.

    python tools/evaluate.py --checkpoint runs/demo/checkpoints/latest --data data/emoji --untrained
    python tools/evaluate.py --checkpoint VTP-Large-f16d64 --data data/own --split test --out metrics.json
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import run  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a run, or a released model's folder")
    parser.add_argument("--data", type=Path, required=True, help="data set: a folder with test/, and train/ for k-NN")
    parser.add_argument("--split", default="test", help="folder in --data to measure on (default: test)")
    parser.add_argument("--untrained", action="store_true", help="also measure a freshly initialised model")
    parser.add_argument("--captions", help='tokenizer: "clip" or a .model file (default: the one of the run)')
    parser.add_argument("--max-samples", type=int, help="of each split (default: the run's evaluation.max_samples)")
    parser.add_argument("--batch-size", type=int, help="images at a time (default: the run's evaluation.batch_size)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--out", type=Path, help="write all metrics to this JSON file")
    parser.add_argument("--pictures", type=Path, help="write a grid of inputs and reconstructions to this PNG file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from megavtp.evaluation import format_table, write_metrics
    from megavtp.evaluation.checkpoint import CheckpointEvaluation, choose_device
    from megavtp.training.pictures import reconstruction_grid

    job = CheckpointEvaluation(
        options.checkpoint, options.data, options.split, choose_device(options.device), options.captions,
        options.max_samples, options.batch_size,
    )
    print(f"evaluating on {len(job.test_set)} samples of {options.data / options.split}, {job.device}", file=sys.stderr)
    metrics = job.metrics(job.model)
    compare = {"untrained": job.metrics(job.untrained())} if options.untrained else {}
    print(format_table(metrics, compare))
    for name, reason in job.skipped.items():
        print(f"left out: {name}: {reason}")
    if options.out:
        where = {"checkpoint": str(options.checkpoint), "data": str(options.data), "split": options.split}
        write_metrics(options.out, {**where, "metrics": metrics, **compare, "skipped": job.skipped})
    if options.pictures:
        reconstruction_grid(*job.reconstructions(16), options.pictures)


if __name__ == "__main__":
    run(main)
