"""Flow matching goes along straight lines from noise to data (arXiv 2210.02747, 2209.03003).

Letters: b samples, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def straight_path(data: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return points x_t = t data + (1 - t) noise and velocities data - noise, all (b, C, H, W), for times (b,)."""
    t = times.view(-1, *[1] * (data.ndim - 1))
    return t * data + (1 - t) * noise, data - noise


def flow_matching_terms(velocity: Tensor, target: Tensor, *, samples_total_local: int) -> dict[str, Tensor]:
    """Compute ``mse``, the squared error, and LightningDiT's ``cosine``, 1 - cosine similarity over channels.

    Both are means over samples and positions. ``velocity`` and ``target`` (b, C, H, W) are of some of a rank's
    ``samples_total_local`` samples: over the micro-batches, the terms add up to the rank's means.
    """
    velocity = velocity.float()
    share = len(velocity) / samples_total_local
    cosine = F.cosine_similarity(velocity, target, dim=1, eps=1e-8)
    return {"mse": F.mse_loss(velocity, target) * share, "cosine": (1 - cosine).mean() * share}
