"""Values that change over a run, as pure functions of the 0-based step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megavtp.config.run import OptimizerConfig


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Follow half a cosine from ``start`` at step 0 to ``end`` at step ``steps`` and after (teacher momentum)."""
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * max(step, 0) / steps))


def linear_warmup(step: int, warmup: int, start: float, end: float) -> float:
    """Follow a straight line from ``start`` at step 0 to ``end`` at ``warmup`` and after (teacher temperature)."""
    if step >= warmup:
        return end
    return start + (end - start) * max(step, 0) / warmup


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate: linear over ``warmup`` steps to ``peak``, then half a cosine to ``floor`` at ``steps``.

    Step 0 already has ``peak / warmup``: a rate of 0 would waste the first batch. With ``warmup >= steps`` the run ends
    while still warming up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, floor)


def warmup_hold(step: int, steps: int, warmup: int, peak: float, floor: float, cooldown: float) -> float:
    """Learning rate: linear over ``warmup`` steps to ``peak``, held, then a straight line to ``floor`` at ``steps``
    over the last ``cooldown`` (a fraction of ``steps``); warmup-stable-decay (MiniCPM, arXiv 2404.06395).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (steps - step) / (cooldown * steps) if cooldown else 1.0
    return floor + (peak - floor) * min(1.0, max(0.0, left))


def learning_rate(step: int, steps: int, settings: OptimizerConfig) -> float:
    """Return the rate of a 0-based step: held, then cooled down, if ``settings.cooldown`` is given, else a cosine."""
    shape = (step, steps, settings.warmup_steps, settings.lr, settings.min_lr)
    return warmup_cosine(*shape) if settings.cooldown is None else warmup_hold(*shape, settings.cooldown)
