"""KoLeo: spreads features by pushing each away from its nearest neighbour (arXiv 1806.03198, as used by DINOv2).

Shape letters: c crops, b images on this data-parallel rank, B = dp * b images in all, D feature size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.parallel.collectives import gather_from_dp
from megavtp.parallel.mesh import SINGLE, Mesh

_EPS = 1e-8
# Differences of float32 unit vectors are rounding noise below this. There a push has no direction, and 1 / distance
# would make one duplicated image outweigh everything else in the step: the clamp gives it no gradient instead.
_MIN_DISTANCE = 1e-6


def koleo(features: Tensor, mesh: Mesh = SINGLE) -> Tensor:
    """Sum -mean_i log |x_i - nearest_i| over crops; neighbours are sought among the same crop of all B images.

    ``features``: (c, b, D) or, for one crop, (b, D); not normalised. All ranks must hold the same b, and all local
    rows must come in one call (a neighbour may be in any micro-batch). With one image in all the loss and its
    gradient are 0. Returns a float32 scalar whose mean over dp is the global loss; gradients averaged over dp are
    exact.
    """
    if features.dim() == 2:
        features = features.unsqueeze(0)
    rows = features.shape[1]
    if rows * mesh.dp < 2:
        return 0.0 * features.float().sum()
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), eps=_EPS, dim=-1)
        everyone = gather_from_dp(x.transpose(0, 1).contiguous(), mesh).transpose(0, 1)  # (c, B, D)
        similarity = x.detach() @ everyone.detach().transpose(1, 2)  # (c, b, B)
        similarity.diagonal(mesh.dp_rank * rows, 1, 2).fill_(-torch.inf)  # of each image with itself
        nearest = similarity.argmax(-1)
        neighbour = everyone.gather(1, nearest.unsqueeze(-1).expand_as(x))
        distance = F.pairwise_distance(x, neighbour, eps=_EPS).clamp_min(_MIN_DISTANCE)  # eps avoids 0 / 0 in backward
        return -torch.log(distance + _EPS).mean(-1).sum()
