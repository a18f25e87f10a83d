"""What the adversarial term of the decoder's second stage needs on the last pipeline rank, where it alone is.

Letters: m pictures of a micro-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megavtp.config.share import PassShare
from megavtp.config.sizes import ResolvedConfig, ResolvedModel
from megavtp.models.discriminator import Directions, Discriminator
from megavtp.models.feature_networks import FeatureNetwork, OwnFeatures, PixelFeatures, timm_features
from megavtp.models.second_stage import SecondStageVTP
from megavtp.models.vision_encoder import VisionEncoder
from megavtp.models.vtp import VTP
from megavtp.nn.precision import computing_in
from megavtp.objectives.adversarial import adaptive_weight, hinge, last_layer_gradient, persuasion
from megavtp.objectives.diff_augment import augment
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.rehearsal import rehearsal
from megavtp.pixels import denormalise
from megavtp.planning.cost import Cost, cost_of, line

_EXACT = 3  # with more micro-batches, everything grows linearly
Terms = dict[str, Tensor]


def shape_of(
    config: ResolvedConfig, objectives: frozenset[str], widths: Sequence[int | None] | None, mesh: Mesh
) -> VTP:
    """Make the model of a run, with a discriminator on features of these ``widths``."""
    reconstruction = config.objectives.reconstruction
    if not reconstruction.frozen_encoder:
        return VTP(config.model, mesh, objectives=objectives)
    return SecondStageVTP(
        config.model, mesh, objectives=objectives, frozen_encoder=True, widths=widths,
        average=reconstruction.decoder_momentum > 0,
    )


def features_of(config: ResolvedConfig, dtype: torch.dtype) -> FeatureNetwork | None:
    """Return the network that a discriminator reads, without its weights; None if there is none.

    UserError: it is a ViT of timm, which is absent or knows no such ViT.
    """
    settings = config.objectives.adversarial
    if settings.weight == 0:
        return None
    if settings.features == "own":
        return OwnFeatures(config.model, settings.features_size, dtype)
    return PixelFeatures() if settings.features == "pixels" else timm_features(settings, dtype, read=False)


def feature_bytes(features: FeatureNetwork | None) -> int:
    """Return the bytes of the network's weights."""
    return sum(weight.nbytes for weight in features.parameters()) if isinstance(features, nn.Module) else 0


def unread(features: FeatureNetwork, model: ResolvedModel) -> None:
    """Give a network weights of the rehearsal it is in. Positions are kept: they are few, and made from numbers."""
    if isinstance(features, OwnFeatures):
        features.trunk = VisionEncoder(model).requires_grad_(False)
    if not isinstance(features, nn.Module):
        return
    for part in features.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), False)


class Judge:
    """The discriminator with its features in a rehearsal. It can be made inside of one only."""

    def __init__(self, config: ResolvedConfig, features: FeatureNetwork, dtype: torch.dtype):
        self.settings, self.features, self.dtype = config.objectives.adversarial, features, dtype
        unread(features, config.model)
        self.module = Discriminator(self.features.widths)
        weights = dict(self.module.named_parameters())
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._directions: Directions = {
            name: (torch.empty(len(weights[name])), torch.empty(weights[name][0].numel()))
            for name in self.module.normalised()
        }

    def augmented(self, pictures: Tensor) -> Tensor:
        s = self.settings
        return augment(
            pictures, torch.empty(len(pictures), 5), brightness=s.brightness, saturation=s.saturation,
            contrast=s.contrast, translation=s.translation,
        )

    def persuaded(self, images: Tensor) -> Tensor:
        """Return the decoder's term for decoded images, whose weights are constants."""
        seen = self.augmented(denormalise(images.float()) * 2 - 1)
        with computing_in(self.dtype, images.device):
            inputs = (torch.zeros(()), self.features(seen), self._directions)
            return persuasion(functional_call(self.module, self._weights, inputs)).sum()

    def hinge(self, m: int, size: int) -> Tensor:
        """Return the discriminator's loss on real and decoded pictures."""
        pixels = [torch.empty(m, 3, size, size, dtype=torch.uint8) for _ in range(2)]
        seen = [self.augmented(x / 127.5 - 1) for x in pixels]
        with torch.no_grad():
            features = self.features(torch.cat(seen))
        del seen, pixels
        with computing_in(self.dtype, features[0].device):
            answers = self.module(torch.zeros((), requires_grad=True), features, self._directions)
        return hinge(*answers.chunk(2)).sum()


def discriminator_cost(make: Callable[[], Judge], size: int, m: int) -> Cost:
    """Return the cost of a micro-batch of the discriminator's own pass, of pictures with a side of ``size`` pixels."""
    with rehearsal() as mesh:
        judge = make()
        loss = partial(judge.hinge, m, size)
        return cost_of(mesh, loss, list(judge.module.parameters()))


def balanced_cost(
    model: ResolvedModel, make: Callable[[], Judge], terms_of: Callable[[Tensor, Judge], Terms], part: PassShare,
    dp: int,
) -> Cost:
    """Return the cost of the decoder's terms over a rank's batch, of which the adaptive weight takes each gradient.

    ``terms_of``: of a micro-batch's images. The two gradients of the last layer are sent over dp.
    """
    m = part.micro_batch
    side = model.image_size // model.patch_size

    def at(count: int) -> Cost:
        with rehearsal(dp=dp) as mesh:
            judge = make()

            def rows() -> tuple[Tensor, Tensor]:
                images = torch.empty(count * m, 3, model.image_size, model.image_size, dtype=judge.dtype)
                return images, torch.empty(count * m, model.decoder.width, side, side)

            # Of several micro-batches the outputs are copied together.
            given = rows() if count == 1 else None
            return cost_of(
                mesh, lambda: _balanced(*(given or rows()), m, model.patch_size, judge, terms_of, mesh)
            )

    count = part.micro_batches
    return at(count) if count <= _EXACT else line(at(_EXACT - 1), at(_EXACT), count - _EXACT + 1)


def _balanced(
    images: Tensor, head_input: Tensor, m: int, patch: int, judge: Judge,
    terms_of: Callable[[Tensor, Judge], Terms], mesh: Mesh,
) -> Mapping[str, Tensor]:
    gradients: dict[str, list[Tensor]] = {}
    for own in images.split(m):
        own = own.detach().requires_grad_()
        for name, value in terms_of(own, judge).items():
            gradients.setdefault(name, []).append(torch.autograd.grad(value, own)[0])
    whole = {name: torch.cat(parts) for name, parts in gradients.items()}
    reconstruction = sum(1.0 * whole[name] for name in whole if name != "adversarial")
    assert isinstance(reconstruction, Tensor)
    at_layer = [last_layer_gradient(x, head_input, patch) for x in (reconstruction, whole["adversarial"])]
    whole["adversarial"] *= adaptive_weight(at_layer[0], at_layer[1], mesh)
    return whole


def copied_weights(widths: Sequence[int | None]) -> int:
    """Return the bytes of the discriminator's weights, of which both passes of a step keep a copy."""
    with torch.device("meta"):
        return sum(weight.nbytes for weight in Discriminator(widths).parameters())
