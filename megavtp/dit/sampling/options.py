"""How images are drawn, as options of tools. Light to import: a tool parses before it loads torch."""

from __future__ import annotations

import argparse


def add_sampling_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Those that ``command.settings_of`` reads, ``--weights`` and ``--precision``."""
    parser.add_argument("--method", default="euler", help="euler (default), heun, dopri5 or sde")
    parser.add_argument("--steps", type=int, help="of the method (default: 250); LightningDiT's num_steps - 1")
    parser.add_argument("--shift", type=float, default=1.0, help="of the times; below 1: more steps near the noise")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free; 1 = off (default)")
    parser.add_argument("--interval", default="0,1", help="times of guidance, from noise 0 to data 1 (default: 0,1)")
    parser.add_argument("--guided-channels", type=int, help="guide the first ones only; LightningDiT: 3 (default: all)")
    parser.add_argument("--diffusion", type=float, default=1.0, help="strength of the noise of sde (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--weights", choices=("average", "trained"), default="average", help="(default: average)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the DiT (default: fp32)")
