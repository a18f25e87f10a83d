"""Settings choose how samples are drawn: the solver, its times and the guidance; tools have options for them.

This imports no torch, as tools parse their options first.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megavtp.errors import UserError
from megavtp.options import SEED, new_file, new_path, real, whole

Method = Literal["euler", "heun", "dopri5", "sde"]
METHODS: tuple[str, ...] = get_args(Method)
_STEPS = 250
_INTERVAL = "give two times from 0 (noise) to 1 (data), such as 0.1,1"


@dataclass(frozen=True)
class SamplingSettings:
    """All that decides an image besides the models, the condition and the sample's number.

    Attributes:
        method: euler (order 1), heun (order 2, two velocities per step) and dopri5 (order 5, chooses its steps) solve
            the ordinary differential equation dx/dt = velocity; sde solves the stochastic one with the same marginals.
        steps: number of steps from noise to data; None = 250. LightningDiT's ``num_steps`` counts their ends, one more.
            dopri5 takes none.
        shift: s moves each time t to s t / (1 + (s - 1) t). Below 1, there are more steps near the noise; 1 = off.
        guidance: classifier-free: velocity = free + guidance * (conditioned - free); 1 = off.
        interval: first and last time with guidance.
        guided_channels: how many channels, from the first, are guided; None = all. LightningDiT guides 3.
        diffusion: strength w of the sde's noise, sqrt(2 w (1 - t)) dW; 0 makes it Euler's method.
        rtol, atol: the error of a step that dopri5 allows.

    Raises:
        UserError: a value makes no sense.
    """

    method: Method = "euler"
    steps: int | None = None
    shift: float = 1.0
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    guided_channels: int | None = None
    diffusion: float = 1.0
    rtol: float = 1e-3
    atol: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        steps, shift, (low, high), channels = self.steps, self.shift, self.interval, self.guided_channels
        rules = {
            f"method {self.method}: choose one of {', '.join(METHODS)}": self.method in METHODS,
            f"steps {steps}: must be at least 1": steps is None or steps >= 1,
            "dopri5 chooses its steps by the tolerances: leave steps and shift out": (
                self.method != "dopri5" or (steps is None and shift == 1)
            ),
            f"shift {shift:g}: must be above 0; 1 leaves the times as they are": shift > 0,
            f"guidance {self.guidance:g}: must be at least 0; 1 is none": self.guidance >= 0,
            f"interval {low:g},{high:g}: {_INTERVAL}": 0 <= low <= high <= 1,
            f"guided channels {channels}: must be at least 1": channels is None or channels >= 1,
            f"diffusion {self.diffusion:g}: must be at least 0": self.diffusion >= 0,
            f"rtol {self.rtol:g}, atol {self.atol:g}: must be above 0": self.rtol > 0 and self.atol > 0,
        }
        for text, holds in rules.items():
            if not holds:
                raise UserError(f"sampling: {text}")

    def times(self) -> list[float]:
        """Return the ends of all steps, from 0 (noise) to 1 (data)."""
        count = self.steps or _STEPS
        return [self.shift * t / (1 + (self.shift - 1) * t) for t in (i / count for i in range(count + 1))]


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
        raise argparse.ArgumentTypeError(f"{_INTERVAL}, not {text[:40]!r}")
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
    add(
        "--precision", choices=("fp32", "bf16", "auto"), default="fp32",
        help="of the DiT (default: fp32); auto: bf16 where the machine multiplies it natively",
    )


def settings_of(options: argparse.Namespace) -> SamplingSettings:
    """Return the settings that the options of ``add_sampling_options`` ask for."""
    return SamplingSettings(
        options.method, options.steps, options.shift, options.guidance, options.interval,
        options.guided_channels, options.diffusion, seed=options.seed,
    )
