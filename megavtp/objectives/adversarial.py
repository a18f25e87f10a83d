"""The adversarial terms of the decoder's second stage: hinge losses (arXiv 1802.05957), and the weight that balances
them with the reconstruction (VQGAN, arXiv 2012.09841, equation 7).

Letters: b pictures, M answers for a picture, p pixels of a patch's side, D width of the decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh

_MOST = 1e4  # of the adaptive weight
_EPS = 1e-6


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss for each picture (b,) from its answers (b, M) to real and decoded ones."""
    return (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)) / 2


def persuasion(answers: Tensor) -> Tensor:
    """Return the decoder's loss for each picture (b,): minus the discriminator's mean answer (b, M) to it."""
    return -answers.mean(1)


def last_layer_gradient(at_output: Tensor, layer_input: Tensor, patch: int) -> Tensor:
    """Return the gradient (3 p^2, D) of the decoder's last layer from that of its images.

    The layer is linear, so a backward through the decoder is not needed: with several losses it would be one each.

    Args:
        at_output: gradient of a loss by the images (b, 3, H, W).
        layer_input: what the layer read (b, D, H / p, W / p).
    """
    at_patches = F.pixel_unshuffle(at_output.float(), patch).transpose(0, 1).flatten(1)
    return at_patches @ layer_input.float().transpose(0, 1).flatten(1).T


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, mesh: Mesh) -> Tensor:
    """Return the weight () with which the adversarial gradient is as long as the reconstruction's, at most 10,000.

    Both are gradients of the last layer from this rank's share of the batch; their means over the data-parallel ranks
    are compared, so the weight is the same on every layout.
    """
    both = all_reduce(torch.stack([reconstruction, adversarial]), mesh, "dp") / mesh.dp
    lengths = torch.linalg.vector_norm(both, dim=(1, 2))
    return (lengths[0] / (lengths[1] + _EPS)).clamp(0, _MOST)
