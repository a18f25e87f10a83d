"""A DiT is a velocity field, with classifier-free guidance (arXiv 2207.12598) in an interval of times (2404.07724)."""

from __future__ import annotations

import torch
from torch import Tensor

from megavtp.dit.model.model import DiT


class GuidedField:
    """Gives ``field(x, t, y)``, see ``solvers``. In ``interval`` this is free + scale * (conditioned - free), outside
    it is the conditioned velocity, and the DiT computes no other.

    Args:
        scale: strength of the guidance; 1 = off.
        interval: first and last time of guidance, both included.
        channels: how many channels, from the first, are guided; None = all.
        dtype: dtype of the matrix products; all else is float32.
    """

    def __init__(
        self, dit: DiT, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.dit, self.scale, self.interval, self.channels, self.dtype = dit, scale, interval, channels, dtype

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        low, high = self.interval
        guided = (t >= low) & (t <= high) if self.scale != 1 else torch.zeros(len(t), dtype=torch.bool)
        if not bool(guided.any()):  # the times are on the host: nothing waits for the device here
            return self._velocity(x, t, y)
        rows = guided.nonzero()[:, 0].to(x.device)
        twice = torch.cat([x, x[rows]]), torch.cat([t, t[guided]])
        both = self._velocity(*twice, torch.cat([y, self.dit.no_condition(len(rows)).to(y.dtype)]))
        velocity, free = both[: len(x)].clone(), both[len(x) :, : self.channels]
        velocity[rows, : self.channels] = free + self.scale * (velocity[rows, : self.channels] - free)
        return velocity

    def _velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        t = t.to(x.device, torch.float32)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.dit(x, t, y).float()
