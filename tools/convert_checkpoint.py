"""Convert a checkpoint: a tokenizer between a run's form and the released models', a DiT to and from LightningDiT's.

    python tools/convert_checkpoint.py --from runs/vtp/checkpoints/latest --to hf-vtp --out vtp-hf
    python tools/convert_checkpoint.py --from vtp --decoder runs/vtp_decoder/checkpoints/latest --to hf-vtp --out vtp-2
    python tools/convert_checkpoint.py --from VTP-Large-f16d64 --to native --out ckpt
    python tools/convert_checkpoint.py --from runs/dit/checkpoints/latest --to lightningdit --out dit.pt
    python tools/convert_checkpoint.py --from lightningdit.pt --to native --out dit-ckpt
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import run  # noqa: E402
from megavtp.options import Options, new_path, place, place_name  # noqa: E402


def parse() -> argparse.Namespace:
    formats = ("native", "hf-vtp", "lightningdit")
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=place, required=True, metavar="PATH", help="checkpoint to read")
    parser.add_argument("--to", required=True, choices=formats, help="form to write")
    parser.add_argument("--out", type=new_path, required=True, help="new folder (lightningdit: a .pt file)")
    parser.add_argument("--from-format", choices=formats, help="form of --from (default: found out)")
    parser.add_argument("--captions", type=place_name, help='"clip", a file, or "none" (default: the model\'s own)')
    parser.add_argument("--statistics", type=place, help="latents_stats.pt of a tokenizer, to carry along with it")
    parser.add_argument("--decoder", type=place, help="tokenizer of the same encoder, whose pixel decoder is taken")
    parser.add_argument("--tokenizer", type=place, help="folder of the tokenizer, or latents, that a DiT belongs to")
    parser.add_argument(
        "--module-prefix", action="store_true",
        help='to lightningdit: "module." before the keys of the trained weights, as its own training resumes from',
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from megavtp.conversion import convert
    from megavtp.data.files import refuse_hub_id

    notes = convert(
        refuse_hub_id(options.source), options.to, options.out, source_format=options.from_format,
        captions=options.captions, statistics=options.statistics, tokenizer=options.tokenizer,
        decoder=options.decoder and refuse_hub_id(options.decoder), module_prefix=options.module_prefix,
    )
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run(main)
