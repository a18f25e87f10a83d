"""Pixel reconstruction: L1 plus a perceptual distance (VTP equation 1; LPIPS, arXiv 1801.03924)."""

from collections.abc import Callable

from torch import Tensor

from megavtp.pixels import denormalise


def reconstruction_terms(
    prediction: Tensor, target: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None, *,
    images_total_local: int,
) -> dict[str, Tensor]:
    """Return the unweighted terms ``l1`` and, if asked for, ``perceptual`` of one micro-batch; float32 scalars.

    ``prediction`` and ``target``: (m, 3, H, W), ImageNet-normalised, which is also the space of the L1. ``perceptual``
    maps two float32 batches in [-1, 1] to distances (m,). Each image counts equally: terms are the sum over images of
    the image's mean, divided by ``images_total_local``, the images of all micro-batches of this data-parallel rank. So
    the terms of micro-batches add up, and the mean of that over dp is the global loss.

    The prediction is not clamped to [-1, 1]: a clamp has no gradient outside the range, so an overshooting pixel
    would get no perceptual correction.
    """
    prediction, target = prediction.float(), target.detach().float()
    terms = {"l1": (prediction - target).abs().mean((1, 2, 3)).sum() / images_total_local}
    if perceptual is not None:
        distances = perceptual(denormalise(prediction) * 2 - 1, denormalise(target) * 2 - 1)
        terms["perceptual"] = distances.float().sum() / images_total_local
    return terms
