"""A scaling study from one file: plan it, run it, look how far it is, and read what its curves say.

    python tools/study.py plan    configs/study/emoji_compute.yaml
    python tools/study.py plan    configs/study/vtp_compute.yaml --gpus 64 --device h100
    python tools/study.py run     configs/study/emoji_compute.yaml
    python tools/study.py run     configs/study/vtp_compute.yaml --launch slurm
    python tools/study.py status  configs/study/emoji_compute.yaml
    python tools/study.py results configs/study/emoji_compute.yaml

Started again, `run` skips what has finished and goes on with what was broken off. docs/study.md describes the file.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import go_on_unread, run  # noqa: E402
from megavtp.options import Options, place, real, whole  # noqa: E402

COMMANDS = {
    "plan": "list the cells with their operations and hours", "run": "run what is left",
    "status": "tell how far each cell is", "results": "write the table and tell what the curves say",
}


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("study", type=place, help="YAML file, such as configs/study/emoji_compute.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
        if name == "run":
            command.add_argument(
                "--launch", choices=["here", "slurm"], default="here",
                help="run the links here, one after the other, or submit them as SLURM jobs (default: here)",
            )
            command.add_argument("--link", type=place, metavar="FOLDER", help="run this link alone, as its job does")
        if name == "plan":
            command.add_argument("--gpus", type=whole(1, 1_000_000), help="reckon with so many GPUs at a time")
            command.add_argument("--device", default="h100", help="with --gpus: a100, h100, ... (default: h100)")
            command.add_argument(
                "--utilization", type=real(0, 1, above=True), default=0.4,
                help="with --gpus: share of a device's peak that trainings reach (default: 0.4)",
            )
    return parser.parse_args()


def main() -> int:
    options = parse()
    from megavtp.errors import UserError
    from megavtp.planning.devices import find_device
    from megavtp.study.answers import curves_page
    from megavtp.study.cells import cells_of, links_of
    from megavtp.study.config import CostConfig, load_study
    from megavtp.study.costs import rates_of
    from megavtp.study.curves import fit_results
    from megavtp.study.pages import cost_text, plan_page, status_page
    from megavtp.study.results import rows_of, write_results
    from megavtp.study.runner import run_link, run_study
    from megavtp.study.slurm import jobs_of
    from megavtp.study.submit import submit_study

    study = load_study(options.study, options.overrides)
    status = 0
    if options.command == "run":
        go_on_unread()
        if options.link:
            return run_link(study, options.link)
        if options.launch == "slurm":
            submit_study(study)
            return 0
        status = run_study(study)
    cells = cells_of(study)
    if options.command == "plan" and options.gpus:
        flops = options.gpus * find_device(options.device).peak_tflops * 1e12 * options.utilization
        rates = rates_of([], CostConfig(flops_per_second=flops))
        print(plan_page(study, cells, rates, options.gpus))
    elif options.command == "plan":
        print(plan_page(study, cells, rates_of(links_of(cells), study.cost)))
    elif options.command == "status":
        links, jobs = links_of(cells), {}
        try:
            jobs = jobs_of(links)
        except UserError as error:  # the rest is known without the queue
            print(f"warning: {error}", file=sys.stderr)
        print(status_page(cells, rates_of(links, study.cost), jobs))
    else:
        if options.command == "results":
            write_results(study, cells)
        rows = rows_of(cells)
        print(curves_page(study, fit_results(study, rows), len(rows), len(cells)))
        print(cost_text(cells))
    return status


if __name__ == "__main__":
    run(main)
