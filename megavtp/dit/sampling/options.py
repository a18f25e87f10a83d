"""Tools have these options for sampling. This imports no torch, as tools parse their options first."""

from __future__ import annotations

import argparse
from pathlib import Path

from megavtp.dit.sampling.settings import METHODS, SamplingSettings
from megavtp.options import SEED, new_file, new_path, real, whole


def place_of_samples(text: str) -> Path:
    """Parse ``--out``, a path that ``output.open_output`` can write to."""
    return (new_file(".png", ".npz") if Path(text).suffix else new_path)(text)


def _interval(text: str) -> tuple[float, float]:
    """Parse two times such as "0.1,1"."""
    try:
        low, high = map(real(0, 1), text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        low, high = 1, 0
    if low > high:
        raise argparse.ArgumentTypeError(f"give two times from 0 (noise) to 1 (data), such as 0.1,1, not {text[:40]!r}")
    return low, high


def add_sampling_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the options that ``settings_of`` reads, ``--weights`` and ``--precision``."""
    add, strength = parser.add_argument, real(0, 1e6)
    add("--method", choices=METHODS, default="euler", help="(default: euler)")
    add("--steps", type=whole(1, 1_000_000), help="of the method (default: 250); LightningDiT's num_steps - 1")
    add("--shift", type=real(0, 1e6, above=True), default=1.0, help="of the times; below 1: more steps near the noise")
    add("--guidance", type=strength, default=1.0, help="classifier-free; 1 = off (default)")
    add("--interval", type=_interval, default="0,1", help="times of guidance, noise 0 to data 1 (default: 0,1)")
    add("--guided-channels", type=whole(1, 65_536), help="guide the first ones only; LightningDiT: 3 (default: all)")
    add("--diffusion", type=strength, default=1.0, help="strength of the noise of sde (default: 1)")
    add("--seed", type=SEED, default=0, help="of all that is drawn (default: 0)")
    add("--weights", choices=("average", "trained"), default="average", help="(default: average)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the DiT (default: fp32)")


def settings_of(options: argparse.Namespace) -> SamplingSettings:
    """Return the settings that the options of ``add_sampling_options`` ask for."""
    return SamplingSettings(
        options.method, options.steps, options.shift, options.guidance, options.interval,
        options.guided_channels, options.diffusion, seed=options.seed,
    )
