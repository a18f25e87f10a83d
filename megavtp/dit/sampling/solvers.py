"""These solvers go from noise to data along a velocity field, in given steps or, ``dopri5``, in steps of their own.

Letters: b samples, C channels. A field is called as field(x, t, y) with points (b, C, H, W), times (b,) in float64 on
the CPU and conditions (b, ...); it returns dx/dt. Times run from 0 (noise) to 1 (data).
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from megavtp.errors import UserError

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
# Of dopri5: times and weights of the stages, and fifth- minus fourth-order weights. The last stage's weights give the
# solution.
_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_FIRST = 0.01  # the first step; all steps sum to 1
# Limits of the next step. Where rounding decides an error because it is so small, the growth is the greatest anyway.
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 4.0
_SMALLEST = 1e-9  # the smallest step


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


def dopri5(field: Field, x: Tensor, y: Tensor, rtol: float, atol: float) -> Tensor:
    """Integrate from time 0 to 1 by Dormand and Prince's embedded Runge-Kutta pair of orders 5 and 4 (J. Comp. Appl.
    Math. 6, 1980), with an estimated error of each step below atol + rtol |x|, as the root mean square over a sample's
    values. Each sample chooses its own steps, so that the rest of the batch does not change its path. The host reads
    the errors after each step.

    Raises:
        UserError: the field is not finite, or so rough that no step is small enough.
    """
    result = torch.empty_like(x)
    rows = torch.arange(len(x))  # the samples that have not arrived, which alone are computed
    now = torch.zeros(len(x), dtype=torch.float64)
    step = torch.full_like(now, _FIRST)
    slope = field(x, now, y)
    while len(rows):
        step = torch.minimum(step, 1 - now)
        ahead, last_slope, ratio = _try(field, x, y, now, step, slope, rtol, atol)
        accepted = ratio <= 1
        taken = _like(accepted, x)
        x, slope = torch.where(taken, ahead, x), torch.where(taken, last_slope, slope)
        reached = step >= 1 - now  # this is exact, however the sum is rounded
        now = torch.where(accepted, torch.where(reached, 1.0, now + step), now)
        factor = (_SAFETY * ratio.clamp_min(1e-10) ** -0.2).clamp(_SHRINK, _GROW)
        # Rounded down to a quarter power of 2: the error is a difference of nearly equal numbers, whose rounding would
        # else change all steps, and through them the solution.
        step = step * torch.exp2(torch.floor(4 * torch.log2(factor)) / 4)
        left = now < 1
        if not bool((step[left] > _SMALLEST).all()):  # this is also false for NaN
            raise UserError("dopri5 gets nowhere: the DiT's velocities are not finite, or the tolerances too small")
        if not bool(left.all()):
            done, on = ((mask.nonzero()[:, 0]).to(x.device) for mask in (~left, left))
            result[rows[~left].to(x.device)] = x[done]
            rows, now, step = rows[left], now[left], step[left]
            x, slope, y = x[on], slope[on], y[on]
    return result


def _try(
    field: Field, x: Tensor, y: Tensor, now: Tensor, step: Tensor, slope: Tensor, rtol: float, atol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the points after ``step``, the slopes there, and the estimated over the allowed error (b,)."""
    slopes, width = [slope], _like(step, x)
    for time, weights in zip(_TIMES, _STAGES, strict=True):
        ahead = x + width * _mix(weights, slopes)
        slopes.append(field(ahead, now + time * step, y))
    error = width * _mix(_ERROR, slopes)
    allowed = atol + rtol * torch.maximum(x.abs(), ahead.abs())
    ratio = (error / allowed).square().flatten(1).mean(1).sqrt()
    return ahead, slopes[-1], ratio.double().cpu()


def _mix(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return reduce(torch.add, (weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight))


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Move values (b,) from the CPU to (b, 1, 1, 1) on the device of ``x``, numbers in its precision."""
    dtype = values.dtype if values.dtype == torch.bool else x.dtype
    return values.to(x.device, dtype).view(-1, *[1] * (x.ndim - 1))
