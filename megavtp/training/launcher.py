"""The launchers that train: each rank reads the command line, joins the others and runs the recipe."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from megavtp.config.load import load_config
from megavtp.config.run import RunConfig
from megavtp.errors import UserError
from megavtp.launch import phase, ranks
from megavtp.launch.rendezvous import detect
from megavtp.options import Options, place, whole
from megavtp.training.recipe import Recipe
from megavtp.training.replay import check_replayed
from megavtp.training.run import run


@dataclass(frozen=True)
class Launcher:
    """A launcher that trains: its command line, its settings, its recipe.

    Attributes:
        name, description, example, recipe_help: texts of the command line; the last is the help of ``--config``.
        settings: the class of its configuration.
        default: the YAML recipe to take without ``--config``; None if one must be named.
        validate: checks a configuration for a number of processes and completes its sizes. UserError.
        summary: makes the page of ``--dry-run`` from a checked configuration and the number of processes.
        recipe: makes the recipe from a checked configuration and a device.
        prepare: (checked configuration, rank) is called on every rank before the data are opened.
    """

    name: str
    description: str
    example: str
    recipe_help: str
    settings: type[RunConfig]
    validate: Callable[[Any, int], Any]
    summary: Callable[[Any, int], str]
    recipe: Callable[[Any, torch.device], Recipe]
    default: Path | None = None
    prepare: Callable[[Any, int], None] | None = None

    def launch(self) -> NoReturn:
        """Launch the run; this is the entry point and never returns."""
        ranks.run_ranks(self.main)

    def parser(self) -> argparse.ArgumentParser:
        parser = Options(
            prog=f"deepspeed launchers/{self.name}", description=self.description, epilog=f"example: {self.example}"
        )
        parser.add_argument("--config", type=place, help=self.recipe_help)
        parser.add_argument("--deepspeed_config", type=place, help="JSON with further DeepSpeed keys")
        parser.add_argument(
            "--replay", type=whole(0, 2**53), metavar="STEP",
            help="do a step again from the checkpoint before it, print what in it is not finite (then status 3), and "
                 "stop",
        )
        parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
        parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # DeepSpeed's examples pass it
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in train.steps=200")
        return parser

    def main(self) -> int:
        """Do the work of one rank; return the exit status."""
        arguments = self.parser().parse_args(sys.argv[1:])
        path = arguments.config or self.default
        if path is None:
            raise UserError(f"name a recipe with --config: {self.recipe_help}")
        member = detect()
        config = self.validate(
            load_config(path, self.settings, arguments.overrides, arguments.deepspeed_config), member.world
        )
        check_replayed(arguments.replay, config.train.steps)
        if arguments.dry_run:
            if member.rank == 0:
                print(self.summary(config, member.world))
            return 0
        if config.parallel.pp > 1:
            # A kernel that is loaded when it is first called can wait for the device, which can wait for a message.
            os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
        device = ranks.start(config.parallel.timeout)
        if self.prepare is not None and arguments.replay is None:  # a replay writes nothing
            phase.enter("preparing data", slow=True)
            self.prepare(config, member.rank)
        return run(self.recipe(config, device), arguments.replay)
