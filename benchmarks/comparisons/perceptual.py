"""The perceptual distance of VGG features beside the package lpips: distances and their gradient by the image."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import Pair, Setting
from benchmarks.side_by_side import difference
from megavtp.models.lpips import LPIPS
from megavtp.models.lpips_weights import TORCHVISION


@contextmanager
def perceptual(setting: Setting) -> Iterator[Pair]:
    image, batch = setting.size((32, 2), (128, 4), (256, 64))
    ours, theirs = both_networks(setting)
    x, y = (torch.rand(batch, 3, image, image, device=setting.device) * 2 - 1 for _ in range(2))
    x.requires_grad_()

    def by_lpips() -> list[Tensor]:
        with setting.autocast():
            distances = theirs(x, y).flatten()
        return _with_gradient(distances, x)

    def by_us() -> list[Tensor]:
        return _with_gradient(ours(x, y), x)

    yield Pair(
        f"{batch} pairs of images of {image} pixels, VGG, forward and backward", by_us, by_lpips,
        difference(by_us(), by_lpips()),
    )


def both_networks(setting: Setting) -> tuple[LPIPS, nn.Module]:
    """Return our network and the package's, with the same random weights."""
    import lpips

    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(setting.device)  # else it fetches its weights
    theirs.requires_grad_(False)
    # Its slices number the layers as torchvision's ``features`` do.
    layers = {name.split(".")[1]: module for name, module in theirs.net.named_modules() if name.count(".") == 1}
    weights = {
        f"conv.{i}.{kind}": getattr(layers[str(place)], kind)
        for i, place in enumerate(TORCHVISION["vgg"]) for kind in ("weight", "bias")
    }
    weights |= {f"head.{j}": head.model[1].weight.flatten() for j, head in enumerate(theirs.lins)}
    return LPIPS("vgg", weights, setting.dtype).to(setting.device), theirs


def _with_gradient(distances: Tensor, x: Tensor) -> list[Tensor]:
    return [distances.detach(), *torch.autograd.grad(distances.sum(), x)]
