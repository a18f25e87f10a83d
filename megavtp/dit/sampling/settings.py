"""Settings choose how samples are drawn: the solver, its times and the guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megavtp.errors import UserError

Method = Literal["euler", "heun", "dopri5", "sde"]
METHODS: tuple[str, ...] = get_args(Method)
_STEPS = 250


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
        low, high = self.interval
        adaptive = self.method == "dopri5"
        rules = {
            f"method {self.method}: choose one of {', '.join(METHODS)}": self.method in METHODS,
            f"steps {self.steps}: must be at least 1": self.steps is None or self.steps >= 1,
            "dopri5 chooses its steps by the tolerances: leave steps and shift out": not adaptive or (
                self.steps is None and self.shift == 1
            ),
            f"shift {self.shift:g}: must be above 0; 1 leaves the times as they are": self.shift > 0,
            f"guidance {self.guidance:g}: must be at least 0; 1 is none": self.guidance >= 0,
            f"interval {low:g},{high:g}: give two times from 0 (noise) to 1 (data), such as 0.1,1": (
                0 <= low <= high <= 1
            ),
            f"guided channels {self.guided_channels}: must be at least 1": (
                self.guided_channels is None or self.guided_channels >= 1
            ),
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
