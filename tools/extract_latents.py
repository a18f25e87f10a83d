"""Encode a data set into latents for the training of a DiT: shards in LightningDiT's format, with statistics.

    deepspeed tools/extract_latents.py --tokenizer vtp-hf --data data/imagenet --label class --out data/latents
    deepspeed --num_accelerators 2 tools/extract_latents.py --tokenizer runs/demo/checkpoints/latest \\
        --data data/emoji --label group --out data/emoji_latents                    # two processes on a CPU
    python tools/extract_latents.py --tokenizer vtp-hf --data data/own --captions --no-flip --out data/own_latents

Stopped or killed, the same command goes on, with any number of processes; the files are the same, byte for byte. On a
CPU a process computes on one core.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import guard  # noqa: E402
from megavtp.options import BAD, BATCH, WORKERS, Options, add_device, new_folder, place, place_name  # noqa: E402


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=place, required=True, help="checkpoint of a run, or a released folder")
    parser.add_argument("--data", type=place, required=True, help="data set: a folder with train/, or of shards")
    parser.add_argument("--split", type=place_name, default="train", help="split of --data (default: train)")
    parser.add_argument("--out", type=new_folder, required=True, help="folder to make, or to go on with")
    parser.add_argument("--label", help="key of the metadata that names a sample's class (default: all are class 0)")
    parser.add_argument("--no-flip", dest="flip", action="store_false", help="no latents of the mirrored images")
    parser.add_argument("--captions", action="store_true", help="also caption features, for model.condition=caption")
    parser.add_argument("--batch-size", type=BATCH, default=32, help="images at a time (default: 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)")
    parser.add_argument(
        "--workers", type=WORKERS, help="processes that decode, for each that encodes (default: 4; CPU: 0)"
    )
    parser.add_argument("--max-bad", type=BAD, default=1000, help="unreadable samples that a process may leave out")
    add_device(parser)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    from megavtp.checkpoint.once import opened_once
    from megavtp.config.precision import compute_dtype
    from megavtp.data.shards import split_folder
    from megavtp.extraction.job import Extraction, ExtractionSettings
    from megavtp.launch.tool import join_others
    from megavtp.parallel.collectives import together
    from megavtp.parallel.looking import from_first
    from megavtp.tokenizer import load_tokenizer

    settings = ExtractionSettings(options.label, options.flip, options.captions, options.batch_size, options.precision)
    device, mesh = join_others(options.device)
    with opened_once(options.tokenizer) as opened:
        tokenizer = together(
            lambda: load_tokenizer(options.tokenizer, device, compute_dtype(options.precision), opened=opened)
        )
    workers = options.workers if options.workers is not None else 4 if device.type == "cuda" else 0
    data = from_first(lambda: split_folder(options.data, options.split))
    job = Extraction(
        tokenizer, data, options.out, settings, mesh, workers=workers, max_bad=options.max_bad,
        quiet=mesh.rank > 0 or not sys.stderr.isatty(),
    )
    artifact, left_out = job.run()
    if mesh.rank > 0:
        return
    statistics = artifact.needed_statistics(str(options.out))
    print(f"{options.out}: {len(job.data)} samples in {job.folder.shards} shards; left out now: {left_out}")
    print(f"channel means {min(statistics.mean):.3f} to {max(statistics.mean):.3f}, "
          f"standard deviations {min(statistics.std):.3f} to {max(statistics.std):.3f}")
    if tokenizer.artifact.statistics is not None:
        print(f"note: the statistics are those that {options.tokenizer} carries already")
    if options.label is None and not options.captions:
        print("note: without --label all images are of class 0: a DiT on these latents learns no classes")


if __name__ == "__main__":
    guard()
    told = parse()  # before the imports, which take seconds
    from megavtp.launch.tool import run_tool

    run_tool(main, told)
