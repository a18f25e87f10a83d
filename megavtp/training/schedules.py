"""Values that change over a run, as pure functions of the 0-based step: nothing to save, nothing to restore."""

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


def learning_rate(step: int, steps: int, settings: OptimizerConfig) -> float:
    """Return the rate of a 0-based step: it rises in a line to ``lr`` at the end of the warm-up.

    From there it follows half a cosine to ``min_lr`` at ``steps``. If ``cooldown`` is given, it is held instead, and
    falls in a line over that last fraction of the steps (warmup-stable-decay: MiniCPM, arXiv 2404.06395).

    Step 0 already has ``lr / warmup_steps``: a rate of 0 would waste the first batch. With ``warmup_steps >= steps``
    the run ends while still warming up.
    """
    warmup, peak, floor, cooldown = settings.warmup_steps, settings.lr, settings.min_lr, settings.cooldown
    if step < warmup:
        return peak * (step + 1) / warmup
    if cooldown is None:
        return cosine(step - warmup, steps - warmup, peak, floor)
    left = (steps - step) / (cooldown * steps) if cooldown else 1.0
    return floor + (peak - floor) * min(1.0, max(0.0, left))
