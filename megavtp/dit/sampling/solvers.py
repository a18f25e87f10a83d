"""These solvers go from noise to data along a velocity field, in given steps.

Letters: b samples, C channels. A field is called as field(x, t, y) with points (b, C, H, W), times (b,) in float64 on
the CPU and conditions (b, ...); it returns dx/dt. Times run from 0 (noise) to 1 (data).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor, Tensor], Tensor]


def euler(field: Field, x: Tensor, y: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate by Euler's method, order 1, from ``times[0]`` to ``times[-1]``."""
    for now, then in pairwise(times):
        x = x + (then - now) * field(x, _all_at(now, x), y)
    return x


def heun(field: Field, x: Tensor, y: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate by Heun's method, order 2, which averages the velocities at both ends of a step."""
    for now, then in pairwise(times):
        step = then - now
        first = field(x, _all_at(now, x), y)
        second = field(x + step * first, _all_at(then, x), y)
        x = x + (step / 2) * (first + second)
    return x


def euler_maruyama(
    field: Field, x: Tensor, y: Tensor, times: Sequence[float], diffusion: float, noise: Callable[[], Tensor]
) -> Tensor:
    """Solve the stochastic differential equation with the field's marginals (SiT, arXiv 2401.08740, eq. 4).

    dx = (v + w s) dt + sqrt(2 w) dW for any w(t) >= 0, here w = diffusion * (1 - t). On straight paths from unit noise
    the score is s = (t v - x) / (1 - t), so w s is finite up to t = 1. The last step adds no noise.

    Args:
        noise: draws new unit normal values like ``x`` at each call.
    """
    for now, then in pairwise(times):
        step = then - now
        velocity = field(x, _all_at(now, x), y)
        x = x + step * (velocity + diffusion * (now * velocity - x))
        if then != times[-1]:
            x = x + math.sqrt(2 * diffusion * (1 - now) * step) * noise()
    return x


def _all_at(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)
