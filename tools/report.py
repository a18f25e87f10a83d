"""Make one HTML page about a run, several side by side, or a study: settings, curves, pictures, measures.

    python tools/report.py runs/demo runs/demo/decoder runs/demo_dit --out report.html
    python tools/report.py configs/study/emoji_compute.yaml --out study.html

The page stands alone: it needs no network and holds no script. It can be mailed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import run  # noqa: E402
from megavtp.options import Options, new_file, place  # noqa: E402


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=place, nargs="+", metavar="RUN", help="output folder of a run; or one study, by its file or folder"
    )
    parser.add_argument("--out", type=new_file(".html"), required=True, help="write the page to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from megavtp.evaluation.report import write_file
    from megavtp.report import render_page
    from megavtp.study.report import render_study, study_file

    study = study_file(options.runs)
    text = render_study(study) if study else render_page(options.runs)
    page = text.encode(errors="replace")  # file names need not be UTF-8
    write_file(options.out, page)
    what = f"the study {study}" if study else f"{len(options.runs)} run(s)"
    print(f"{options.out}: {what}, {len(page) / 2**20:.1f} MiB")


if __name__ == "__main__":
    run(main)
