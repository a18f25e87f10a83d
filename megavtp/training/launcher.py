"""What every launcher that trains does on each rank: read the command line, join the others, run its recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from megavtp.config.load import load_config
from megavtp.errors import UserError
from megavtp.launch import phase, ranks
from megavtp.launch.arguments import launcher_parser
from megavtp.launch.rendezvous import detect
from megavtp.training.recipe import Recipe
from megavtp.training.replay import check_replayed
from megavtp.training.run import run


@dataclass(frozen=True)
class Launcher:
    """One of the launchers: its words, its settings, its recipe.

    Attributes:
        name, description, example, recipe_help: of the command line; the last says what is special of ``--config``.
        settings: the class of its configuration.
        default: the YAML recipe where ``--config`` names none; None if one must be named.
        validate: (configuration, processes) -> the same, checked, with its sizes. UserError.
        summary: (checked configuration, processes) -> the page of ``--dry-run``.
        recipe: (checked configuration, device) -> the recipe.
        prepare: (checked configuration, rank), called on every rank before the data are opened.
    """

    name: str
    description: str
    example: str
    recipe_help: str
    settings: type
    validate: Callable[[Any, int], Any]
    summary: Callable[[Any, int], str]
    recipe: Callable[[Any, torch.device], Recipe]
    default: Path | None = None
    prepare: Callable[[Any, int], None] | None = None

    def launch(self) -> NoReturn:
        """Entry point; never returns."""
        ranks.run_ranks(self.main)

    def main(self) -> int:
        """What each rank does; returns the exit status."""
        parser = launcher_parser(self.name, self.description, self.recipe_help, self.example)
        arguments = parser.parse_intermixed_args(sys.argv[1:])
        if (arguments.config or self.default) is None:
            raise UserError(f"name a recipe with --config: {self.recipe_help}")
        place = detect()
        config = load_config(arguments.config, arguments.overrides, arguments.deepspeed_config, self.settings)
        config = self.validate(config, place.world)
        check_replayed(arguments.replay, config.train.steps)
        if arguments.dry_run:
            if place.rank == 0:
                print(self.summary(config, place.world))
            return 0
        device = ranks.start(config.parallel.timeout)
        if self.prepare is not None:
            phase.enter("preparing data", slow=True)
            self.prepare(config, place.rank)
        return run(self.recipe(config, device), arguments.replay)
