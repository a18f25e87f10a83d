"""Draw images with a trained DiT, alone or on several processes.

    python tools/sample.py --dit runs/dit/checkpoints/latest --tokenizer vtp-hf --classes 3,7 --out samples.png
    python tools/sample.py --dit runs/dit/checkpoints/latest --tokenizer vtp-hf --classes Flags,Symbols --guidance 4 \\
        --interval 0.1,1 --per-class 16 --out samples/
    deepspeed tools/sample.py --dit dit-ckpt --tokenizer vtp-hf --classes all --per-class 50 --precision bf16 \\
        --shift 0.075 --out samples.npz
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import guard  # noqa: E402
from megavtp.dit.sampling.settings import add_sampling_options, place_of_samples  # noqa: E402
from megavtp.options import BATCH, IMAGES, Options, add_device, place  # noqa: E402


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", type=place, required=True, help="checkpoint of a DiT")
    parser.add_argument("--tokenizer", type=place, required=True, help="folder of the tokenizer of its latents")
    parser.add_argument("--classes", help='labels or names, with commas, or "all"')
    parser.add_argument("--caption", action="append", help="of a DiT that takes captions; may be given several times")
    parser.add_argument("--per-class", type=IMAGES, default=8, help="images of each class or caption (default: 8)")
    parser.add_argument("--out", type=place_of_samples, required=True, help="x.png, x.npz (ADM's form) or a new folder")
    add_sampling_options(parser)
    parser.add_argument("--batch-size", type=BATCH, default=32, help="images at a time on each process (default: 32)")
    add_device(parser)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    from megavtp.dit.sampling.output import open_output
    from megavtp.dit.sampling.sampler import all_images, sampler_of
    from megavtp.dit.sampling.samples import names_of, samples_of
    from megavtp.launch.tool import join_others

    device, mesh = join_others(options.device)
    sampler = sampler_of(options, device)
    samples = samples_of(sampler.dit, options.classes, options.caption, options.per_class)
    first = mesh.rank == 0
    with open_output(options.out, names_of(sampler.dit, samples)) if first else nullcontext() as add:
        for images in all_images(sampler, samples, options.batch_size, mesh, not (first and sys.stderr.isatty())):
            if add is not None:
                add(images)
    if first:
        print(f"wrote {len(samples)} images to {options.out}")


if __name__ == "__main__":
    guard()
    told = parse()  # before the imports, which take seconds
    from megavtp.launch.tool import run_tool

    run_tool(main, told)
