"""Image-text contrastive loss with a sigmoid per pair (SigLIP, arXiv 2303.15343).

Shape letters: b pairs on this data-parallel rank, B = dp * b pairs in all, E embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.parallel.collectives import gather_from_dp
from megavtp.parallel.mesh import SINGLE, Mesh


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, mesh: Mesh = SINGLE) -> Tensor:
    """-1/B sum_ij log sigmoid(z_ij (scale x_i.y_j + bias)), z_ij = 1 for a pair that belongs together, else -1.

    Image (b, E) and text (b, E) are L2-normalised, ``scale`` and ``bias`` scalar tensors. Own b images meet all B
    texts. All ranks must hold the same b. Returns a float32 scalar whose mean over dp is the global loss; gradients
    averaged over dp are exact.
    """
    rows = image.shape[0]
    with torch.autocast(image.device.type, enabled=False):
        logits = scale.float() * image.float() @ gather_from_dp(text.float(), mesh).T
        if bias is not None:
            logits = logits + bias.float()
        signs = torch.full_like(logits, -1.0)
        signs.diagonal(mesh.dp_rank * rows).fill_(1.0)
        return -F.logsigmoid(signs * logits).sum() / rows
