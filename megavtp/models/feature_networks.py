"""The frozen networks whose features a discriminator reads. Pictures (b, 3, H, W) come in with black at -1, white at 1.

``widths`` are the channels of each output (b, N, C); None is an output that is the picture itself. The networks are
whole on every rank that uses them, as the perceptual network is: no group of ranks has to wait for another.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.arithmetic import ceil_div
from megavtp.config.schema import AdversarialConfig
from megavtp.config.sizes import ResolvedModel
from megavtp.data.weights_file import read_weights_file
from megavtp.errors import UserError
from megavtp.models.fitting import check, copy_whole
from megavtp.models.vision_encoder import VisionEncoder
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.precision import computing_in
from megavtp.nn.rope import reset_rope
from megavtp.parallel.mesh import SINGLE
from megavtp.pixels import from_unit

TIMM = "timm:"
_FEATURES = f"objectives.adversarial.features = {TIMM}"
_REMEDY = "objectives.adversarial.features_weights takes the weights of the timm ViT that features names"


class FeatureNetwork(Protocol):
    """A function of pictures that is differentiable and never trained."""

    widths: Sequence[int | None]

    def __call__(self, pictures: Tensor) -> list[Tensor]: ...


class PixelFeatures:
    """The pictures themselves."""

    widths: Sequence[int | None] = (None,)

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        return [pictures]


def quarters(depth: int) -> list[int]:
    """Return the blocks at which a quarter of a network's depth is done, two, three and all: 2, 5, 8, 11 of 12."""
    return sorted({ceil_div(depth * quarter, 4) - 1 for quarter in (1, 2, 3, 4)})


def own_widths(model: ResolvedModel) -> Sequence[int | None]:
    """Return the widths of ``OwnFeatures``: one for each quarter, and that after the last norm."""
    return [model.vision.width] * (len(quarters(model.vision.depth)) + 1)


def known_widths(settings: AdversarialConfig, model: ResolvedModel) -> Sequence[int | None] | None:
    """Return the widths of a discriminator's features without building them; None if it is off, or reads a timm ViT."""
    if settings.weight > 0 and settings.features == "own":
        return own_widths(model)
    return PixelFeatures.widths if settings.weight > 0 and settings.features == "pixels" else None


class OwnFeatures(nn.Module):
    """The tokenizer's own frozen encoder: its patch tokens at each quarter of its depth, and after its last norm."""

    def __init__(
        self, config: ResolvedModel, size: int | None, compute_dtype: torch.dtype, attention: Kernel = "auto"
    ):
        super().__init__()
        self.size, self.compute_dtype = size or config.image_size, compute_dtype
        with torch.device("meta"):
            self.trunk = VisionEncoder(config, attention=attention).requires_grad_(False)
        self.taps = quarters(config.vision.depth)
        self.widths = own_widths(config)

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Fill the network with the encoder's whole tensors, by their names in it. Foreign weights may lack the mask
        token, which no picture here uses: it is then zero, as it is drawn."""
        own = dict(self.trunk.to_empty(device=device).named_parameters())
        assert own.keys() - tensors.keys() <= {"mask_token"}, own.keys() - tensors.keys()
        reset_rope(self.trunk)
        with torch.no_grad():
            self.trunk.mask_token.zero_()
        copy_whole(own, tensors, SINGLE)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        images = from_unit(_resized(pictures, self.size) / 2 + 0.5)
        with computing_in(self.compute_dtype, images.device):
            inner: Any = self.trunk([images], layers=self.taps, normalise=False)
            tokens = [sizes[0] for sizes in inner]
            return [x[:, 1:] for x in (*tokens, self.trunk.norm(tokens[-1]))]


class TimmFeatures(nn.Module):
    """A ViT of the timm library, such as DINO's (``vit_small_patch8_224.dino``), read in the same places."""

    def __init__(self, model: Any, size: int | None, compute_dtype: torch.dtype):
        super().__init__()
        self.compute_dtype = compute_dtype
        self.model = model
        settings = model.pretrained_cfg
        self.mean, self.std = settings["mean"], settings["std"]
        self.size = size or settings["input_size"][-1]
        self.taps = quarters(len(model.blocks))
        self.widths: Sequence[int | None] = [model.embed_dim] * (len(self.taps) + 1)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        images = from_unit(_resized(pictures, self.size) / 2 + 0.5, self.mean, self.std)
        with computing_in(self.compute_dtype, images.device):
            tokens = self.model.forward_intermediates(
                images, indices=self.taps, output_fmt="NLC", intermediates_only=True
            )
            return [*tokens, self.model.norm(tokens[-1])]


def timm_features(settings: AdversarialConfig, compute_dtype: torch.dtype, *, read: bool = True) -> TimmFeatures:
    """Return the features that ``settings`` name, with their weights if they are to be ``read``.

    UserError: timm is absent or knows no such ViT, or the weights do not fit it.
    """
    name = settings.features.removeprefix(TIMM)
    if settings.features_weights is None:
        raise UserError(f"{_FEATURES}{name} needs the file of its weights: {_REMEDY}")
    asked = f"{_FEATURES}{name}"
    model = load_timm_vit(name, settings.features_weights, asked, _REMEDY) if read else _timm_vit(name, asked)
    return TimmFeatures(model.requires_grad_(False), settings.features_size, compute_dtype)


def load_timm_vit(name: str, weights: str | Path, asked: str, remedy: str) -> Any:
    """Return timm's frozen ViT of this name, without its classifier, with the weights in a file.

    ``asked`` is the setting that names it, and ``remedy`` what to do about the file, for the UserError that tells that
    timm is absent or knows no such ViT, or that the weights do not fit it.
    """
    model = _timm_vit(name, asked)
    state = read_weights_file(Path(weights), "no weights", remedy)
    found = {key: value for key, value in state.items() if not key.startswith("head.")}
    check(found, {key: list(value.shape) for key, value in model.state_dict().items()}, f"{weights} ({name})")
    model.load_state_dict(found)
    return model.eval().requires_grad_(False)


def _timm_vit(name: str, asked: str) -> Any:
    try:
        import timm
    except (ImportError, OSError, RuntimeError) as error:  # the last is a torchvision that is not for this torch
        remedy = 'pip install "megavtp[timm]"'
        raise UserError(f"{asked} needs the timm library ({error}): {remedy}") from None
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models())
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has the names"
        raise UserError(f"{asked}: timm has no such model; {hint}")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:  # of a network without patches
        model = None
    if not all(hasattr(model, part) for part in ("blocks", "norm", "forward_intermediates")):
        raise UserError(f"{asked} is no ViT: name one (vit_...)")
    return model


def _resized(pictures: Tensor, size: int) -> Tensor:
    if size == pictures.shape[-1]:
        return pictures
    return F.interpolate(pictures, (size, size), mode="bicubic", antialias=True, align_corners=False)
