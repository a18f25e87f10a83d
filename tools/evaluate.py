"""Evaluate a checkpoint: zero-shot, retrieval, k-NN and linear probes on frozen features, reconstruction, latents.

    python tools/evaluate.py --checkpoint runs/demo/checkpoints/latest --data data/emoji --untrained
    python tools/evaluate.py --checkpoint VTP-Large-f16d64 --data data/own --split test --out metrics.json

Distances of generated images to a reference: python tools/evaluate.py generation --help
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import guard  # noqa: E402
from megavtp.dit.sampling.settings import add_sampling_options  # noqa: E402
from megavtp.options import BATCH, IMAGES, PIXELS, Options, add_device, new_file, place, place_name  # noqa: E402

GENERATION = """Distances of generated images to a reference: gFID, KID, precision and recall with the weights of
Inception, FD-EfficientNet and its like without. docs/metrics.md says which numbers can be compared.

    python tools/evaluate.py generation --samples-from samples.npz --reference data/emoji/train
    python tools/evaluate.py generation --samples-from samples/ --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception weights-inception-2015-12-05-6726825d.pth
    deepspeed tools/evaluate.py generation --dit runs/dit/checkpoints/latest --tokenizer vtp-hf \\
        --reference data/imagenet/train --samples 10000 --out generation.json
"""


def add_network(parser: argparse.ArgumentParser, instead: str) -> None:
    """Add the options that choose another feature network than EfficientNet-Lite0."""
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--inception", type=place, help=f"file of FID's Inception weights: {instead}")
    network.add_argument(
        "--timm", nargs=2, type=place_name, metavar=("NAME", "FILE"),
        help="a ViT of the timm library, such as DINOv2, and the file of its weights: distances of its features",
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=place, required=True, help="of a run, or a released model's folder")
    parser.add_argument("--data", type=place, required=True, help="data set: a folder with test/, and train/ for k-NN")
    parser.add_argument("--split", type=place_name, default="test", help="folder in --data to measure (default: test)")
    parser.add_argument("--untrained", action="store_true", help="also measure a freshly initialised model")
    parser.add_argument("--captions", type=place_name, help='"clip" or a tokenizer\'s file (default: the run\'s)')
    parser.add_argument(
        "--templates", type=place,
        help='file of sentences with "{}" for the class\'s name, one a line (default: the run\'s evaluation.templates)',
    )
    parser.add_argument("--max-samples", type=IMAGES, help="of each split (default: the run's evaluation.max_samples)")
    parser.add_argument("--batch-size", type=BATCH, help="images at a time (default: the run's evaluation.batch_size)")
    add_device(parser)
    parser.add_argument("--frechet", action="store_true", help="also FD-EfficientNet of the reconstructions")
    add_network(parser, "rFID in place of FD-EfficientNet")
    parser.add_argument(
        "--probe", action="append", default=[], choices=["latents", "features"],
        help="also train linear classifiers on these; may be given twice",
    )
    parser.add_argument("--out", type=new_file(), help="write all metrics to this JSON file")
    parser.add_argument("--pictures", type=new_file(), help="write inputs and reconstructions to this PNG file")
    return parser.parse_args(arguments)


def parse_generation(arguments: list[str]) -> argparse.Namespace:
    shown_as_it_is = argparse.RawDescriptionHelpFormatter
    parser = Options("evaluate.py generation", description=GENERATION, formatter_class=shown_as_it_is)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples-from", type=place, help="folder of images, or .npz of ADM's form")
    source.add_argument("--dit", type=place, help="checkpoint of a DiT, which draws the samples")
    parser.add_argument("--tokenizer", type=place, help="with --dit: folder of the tokenizer whose latents it makes")
    parser.add_argument(
        "--reference", type=place, required=True,
        help="folder of shards (or with train/), folder of images, or .npz with images, statistics or both",
    )
    parser.add_argument("--samples", type=IMAGES, help="how many (default: all there are; with --dit 10000)")
    parser.add_argument("--reference-samples", type=IMAGES, help="at most so many images (default: all)")
    parser.add_argument("--size", type=PIXELS, help="crop and resize to this many pixels (default: the samples' own)")
    add_network(parser, "gFID in place of FD-EfficientNet")
    parser.add_argument(
        "--scale", action="store_true", help="also measure the reference's images blurred, an untrained DiT's, noise"
    )
    parser.add_argument(
        "--label", help="with --dit: key of the reference's metadata with the classes, drawn as often as they are there"
    )
    parser.add_argument("--equal-classes", action="store_true", help="with --label: equally many samples of each class")
    parser.add_argument("--batch-size", type=BATCH, default=64, help="images at a time on each process (default: 64)")
    add_device(parser)
    parser.add_argument("--out", type=new_file(), help="write everything to this JSON file")
    parser.add_argument("--save-reference", type=new_file(".npz"), help="write the reference's statistics to this file")
    parser.add_argument(
        "--reference-features", type=new_file(".safetensors"), metavar="FILE",
        help="read the reference's features from this file; if it is not there, write them, for the next samples",
    )
    add_sampling_options(parser.add_argument_group("with --dit, how samples are drawn"))
    return parser.parse_args(arguments)


def checkpoint(options: argparse.Namespace) -> None:
    from megavtp.evaluation import format_table, write_metrics
    from megavtp.evaluation.distances.measure import load_network
    from megavtp.evaluation.tokenizer.checkpoint import CheckpointEvaluation
    from megavtp.evaluation.tokenizer.classification import read_templates
    from megavtp.launch.tool import join_others
    from megavtp.parallel.collectives import together
    from megavtp.parallel.looking import from_first
    from megavtp.training.pictures import reconstruction_grid

    device, mesh = join_others(options.device)
    wants_network = options.frechet or options.inception or options.timm
    frechet = together(lambda: load_network(options.inception, device, options.timm)) if wants_network else None
    templates = options.templates and from_first(lambda: read_templates(options.templates))
    job = CheckpointEvaluation(
        options.checkpoint, options.data, options.split, device, options.captions, options.max_samples,
        options.batch_size, templates, frechet, options.probe, mesh,
    )
    if mesh.rank == 0:
        print(f"evaluating on {len(job.test_set)} samples of {options.data / options.split}, {device}", file=sys.stderr)
    models = {"metrics": job.model} | ({"untrained": job.untrained()} if options.untrained else {})
    details: dict[str, dict] = {name: {} for name in models}
    found = {name: job.metrics(model, details[name]) for name, model in models.items()}
    if mesh.rank > 0:
        return
    print(format_table(found["metrics"], {name: found[name] for name in found if name != "metrics"}))
    for name, reason in job.skipped.items():
        print(f"left out: {name}: {reason}")
    if options.out:
        where = {"checkpoint": str(options.checkpoint), "data": str(options.data), "split": options.split}
        write_metrics(options.out, {**where, **found, "details": details, "skipped": job.skipped})
    if options.pictures:
        reconstruction_grid(*job.reconstructions(16), options.pictures)


def generation(options: argparse.Namespace) -> None:
    from megavtp.evaluation.generation.job import run_generation

    run_generation(options)


if __name__ == "__main__":
    guard()
    # Parsed before the imports, which take seconds. The deepspeed launcher puts an option of its own in front.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    if words[:1] == ["generation"]:
        main, told = generation, parse_generation(words[1:])
    else:
        main, told = checkpoint, parse(words)
    from megavtp.launch.tool import run_tool

    run_tool(main, told)
