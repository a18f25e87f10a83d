"""Two image-text contrastive losses: a softmax over the batch (InfoNCE; CLIP, arXiv 2103.00020; VTP section 3.4), or a
sigmoid per pair (SigLIP, arXiv 2303.15343).

Shape letters: b pairs on this data-parallel rank, B = dp * b pairs in all, E embedding size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.parallel.collectives import begin_gather_from_dp
from megavtp.parallel.mesh import SINGLE, Mesh


def info_nce(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, mesh: Mesh = SINGLE,
    texts: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute symmetric InfoNCE of L2-normalised image (b, E) and text (b, E); all other pairs of the B are negatives.

    ``scale`` is the inverse temperature (a scalar tensor). Each rank compares its own b rows with all B columns, so
    the B x B matrix exists on no rank. All ranks must hold the same b. Returns a float32 scalar, the mean over own
    rows; its mean over dp is the global loss, and gradients averaged over dp are exact.
    """
    rows = image.shape[0]
    labels = torch.arange(rows, device=image.device) + mesh.dp_rank * rows
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = image.float(), text.float(), scale.float()
        texts = texts or begin_gather_from_dp(text, mesh)
        images = begin_gather_from_dp(image, mesh)  # it travels while the first product is computed
        to_text = scale * image @ texts().T
        to_image = scale * text @ images().T
        loss = 0.5 * (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels))
    # A softmax does not see a constant: adding the bias would only give it rounding noise for a gradient, which Adam
    # would amplify. This way the gradient exists and is exactly zero.
    return loss if bias is None else loss + 0.0 * bias.float().sum()


def siglip(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, mesh: Mesh = SINGLE,
    texts: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute -1/B sum_ij log sigmoid(z_ij (scale x_i.y_j + bias)), z_ij = 1 for a pair that belongs together, else -1.

    Image (b, E) and text (b, E) are L2-normalised, ``scale`` and ``bias`` scalar tensors. Own b images meet all B
    texts; ``texts`` as in ``info_nce``. All ranks must hold the same b. Returns a float32 scalar whose mean over dp is
    the global loss; gradients averaged over dp are exact.
    """
    rows = image.shape[0]
    with torch.autocast(image.device.type, enabled=False):
        texts = texts or begin_gather_from_dp(text.float(), mesh)
        logits = scale.float() * image.float() @ texts().T
        if bias is not None:
            logits = logits + bias.float()
        signs = torch.full_like(logits, -1.0)
        signs.diagonal(mesh.dp_rank * rows).fill_(1.0)
        return -F.logsigmoid(signs * logits).sum() / rows
