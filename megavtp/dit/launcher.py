"""What `launchers/train_dit.py` does on each rank: read the command line, join the others, build, train."""

from __future__ import annotations

import sys
from typing import NoReturn

from megavtp.config.load import load_config
from megavtp.dit.config import DiTConfig
from megavtp.dit.recipe import DiTRun
from megavtp.dit.summary import dit_summary
from megavtp.dit.validate import validate_dit
from megavtp.errors import UserError
from megavtp.launch import ranks
from megavtp.launch.rendezvous import detect
from megavtp.launch.two_on_a_cpu import processes_of_run, start_two_on_a_cpu
from megavtp.pretraining.launcher import launcher_parser
from megavtp.training.replay import check_replayed


def train_dit() -> NoReturn:
    """Entry point; never returns."""
    start_two_on_a_cpu()
    ranks.run_ranks(_main)


def _main() -> int:
    parser = launcher_parser(
        "train_dit.py", "Train a diffusion transformer on the latents of a tokenizer.",
        "recipe (YAML), such as configs/dit/dit_xl.yaml",
        "deepspeed --num_gpus 8 launchers/train_dit.py --config configs/dit/dit_xl.yaml data.root=data/latents",
    )
    arguments = parser.parse_intermixed_args(sys.argv[1:])
    if arguments.config is None:
        raise UserError("name a recipe with --config; those for a DiT are under configs/dit")
    place = detect()
    config = load_config(arguments.config, arguments.overrides, arguments.deepspeed_config, DiTConfig)
    world = processes_of_run(place.world)
    config = validate_dit(config, world)
    check_replayed(arguments.replay, config.train.steps)
    if arguments.dry_run:
        if place.rank == 0:
            print(dit_summary(config, world))
        return 0
    device = ranks.start(config.parallel.timeout)
    run = DiTRun(config, device, writes=arguments.replay is None)
    if arguments.replay is not None:
        return run.replay(arguments.replay)
    with run.output:
        return 0 if run.train() else ranks.STOPPED
