"""A DiT is a velocity field, with classifier-free guidance (arXiv 2207.12598) in an interval of times (2404.07724)."""

import torch
from torch import Tensor

from megavtp.dit.model.model import DiT
from megavtp.dit.sampling.solvers import Field


def guided_field(
    dit: DiT, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Field:
    """Return the field free + scale * (conditioned - free). Outside ``interval`` it is the conditioned velocity, and
    the DiT computes no other.

    Args:
        scale: strength of the guidance; 1 = off.
        interval: first and last time of guidance, both included.
        channels: how many channels, from the first, are guided; None = all.
        dtype: dtype of the matrix products; all else is float32.
    """

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        t = t.to(x.device, torch.float32)
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return dit(x, t, y).float()

    def field(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        low, high = interval
        guided = (t >= low) & (t <= high) if scale != 1 else torch.zeros(len(t), dtype=torch.bool)
        if not bool(guided.any()):  # the times are on the host: nothing waits for the device here
            return velocity(x, t, y)
        rows = guided.nonzero()[:, 0].to(x.device)
        twice = torch.cat([x, x[rows]]), torch.cat([t, t[guided]])
        both = velocity(*twice, torch.cat([y, dit.no_condition(len(rows)).to(y.dtype)]))
        result, free = both[: len(x)].clone(), both[len(x) :, :channels]
        result[rows, :channels] = free + scale * (result[rows, :channels] - free)
        return result

    return field
