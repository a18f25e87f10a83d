"""What `launchers/pretrain.py` does on each rank: read the command line, join the others, build, train."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megavtp.config.load import DEMO_CONFIG, load_config
from megavtp.config.schema import Config
from megavtp.config.summary import layout_summary
from megavtp.config.validate import validate
from megavtp.data.sources.emoji import prepare_emoji
from megavtp.errors import UserError
from megavtp.options import Options, place, whole
from megavtp.parallel import launch, phase
from megavtp.parallel.collectives import together
from megavtp.parallel.rendezvous import detect
from megavtp.parallel.two_on_a_cpu import processes_of_run, start_two_on_a_cpu
from megavtp.training.pretrain_run import PretrainRun
from megavtp.training.replay import check_replayed


def pretrain() -> NoReturn:
    """Entry point; never returns."""
    start_two_on_a_cpu()
    launch.run_ranks(_main)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = launcher_parser(
        "pretrain.py", "Pre-train a visual tokenizer.", "recipe (YAML); default: the demo's",
        "deepspeed --num_accelerators 2 launchers/pretrain.py parallel.zero_stage=3 train.steps=200",
    )
    return parser.parse_intermixed_args(arguments)


def launcher_parser(name: str, description: str, recipe: str, example: str) -> argparse.ArgumentParser:
    """The arguments of every launcher that trains; ``recipe`` says of --config what is special here."""
    parser = Options(
        prog=f"deepspeed launchers/{name}", description=description, epilog=f"example: {example}"
    )
    parser.add_argument("--config", type=place, help=recipe)
    parser.add_argument("--deepspeed_config", type=place, help="JSON with further DeepSpeed keys")
    parser.add_argument(
        "--replay", type=whole(0, 2**53), metavar="STEP",
        help="do a step again from the checkpoint before it, print what in it is not finite (then status 3), and stop",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # habit of DeepSpeed scripts
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in train.steps=200")
    return parser


def _main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    place = detect()
    config = load_config(arguments.config, arguments.overrides, arguments.deepspeed_config)
    world = processes_of_run(place.world)
    config = validate(config, world)
    check_replayed(arguments.replay, config.train.steps)
    if arguments.dry_run:
        if place.rank == 0:
            print(layout_summary(config, world))
        return 0
    device = launch.start(config.parallel.timeout)
    phase.enter("preparing data", slow=True)
    if _brings_its_data(arguments.config, config):
        _prepare_demo_data(config, place.rank)
    run = PretrainRun(config, device, writes=arguments.replay is None)
    if arguments.replay is not None:
        return run.replay(arguments.replay)
    with run.output:
        return 0 if run.train() else launch.STOPPED


def _brings_its_data(recipe: Path | None, config: Config) -> bool:
    """Whether this is the demo where it keeps its own data. Another ``data.root`` is the user's to fill: a mistyped one
    must not become a run on emoji."""
    is_demo = recipe is None or recipe.resolve() == DEMO_CONFIG.resolve()
    return is_demo and Path(config.data.root) == Path(load_config(recipe).data.root)


def _prepare_demo_data(config: Config, rank: int) -> None:
    root = Path(config.data.root)

    def prepare() -> None:
        if rank == 0 and not root.exists():
            # Skin tones are more than half of the set and nearly alike: a run of minutes learns more without them.
            prepare_emoji(root, skin_tones=False)

    together(prepare)
    if not root.exists():
        raise UserError(f"{root} is not visible on this machine: data.root must be on a shared file system")
