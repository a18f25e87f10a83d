"""The command line of the launchers that train."""

from __future__ import annotations

import argparse

from megavtp.options import Options, place, whole


def launcher_parser(name: str, description: str, recipe: str, example: str) -> argparse.ArgumentParser:
    """Return the parser of a launcher that trains; ``recipe`` is the help text of its --config."""
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
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # DeepSpeed's own examples pass it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in train.steps=200")
    return parser
