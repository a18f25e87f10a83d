"""The model of the decoder's second stage: a tokenizer whose encoder is frozen, a moving average of its decoder, and a
discriminator."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megavtp.config.sizes import ResolvedModel
from megavtp.models.discriminator import Directions, Discriminator
from megavtp.models.pixel_decoder import PixelDecoder
from megavtp.models.vtp import VTP, Leg
from megavtp.parallel.mesh import SINGLE, Mesh


class SecondStageVTP(VTP):
    """A ``VTP`` with two more towers. The discriminator is on the last pipeline rank, where the images come out, and
    whole on every tensor-parallel rank.

    Args:
        widths: those of the discriminator's features, see ``Discriminator``; None: there is no discriminator.
        average: keep ``averaged_decoder``, which decodes in every pass but the one that trains, ``trained_decode``.
    """

    def __init__(
        self, config: ResolvedModel, mesh: Mesh = SINGLE, *, widths: Sequence[int | None] | None = None,
        average: bool = False, **options: Any,
    ):
        super().__init__(config, mesh, **options)
        self.averaged_decoder: PixelDecoder | None = None
        if average:
            attention, stripe = options.get("attention", "auto"), self.pixel_decoder.stripe
            decoder = PixelDecoder(config, mesh, stripe=stripe, attention=attention)
            self.averaged_decoder = decoder.requires_grad_(False)
        if widths is not None and mesh.is_last_stage:
            self.discriminator = Discriminator(widths)

    def _decode_average(self, chunk: int | None, activations: Sequence[Tensor], **inputs: Any) -> Any:
        """Decode as ``_decode`` does, by the average if there is one."""
        return self._decode(chunk, activations, **inputs, decoder=self.averaged_decoder)

    def _discriminate(
        self, chunk: int | None, activations: Sequence[Tensor], features: Sequence[Tensor] | None = None,
        directions: Directions | None = None,
    ) -> Any:
        """Call the discriminator, see ``Discriminator.forward``. Only the last pipeline rank does."""
        anchor = torch.zeros((), device=self.trunk.rope_embed.periods.device, requires_grad=True)
        return self.discriminator(anchor, features, directions)

    _ROUTES: ClassVar[dict[str, tuple[Leg, ...]]] = {
        **VTP._ROUTES, "reconstruction": (VTP._encode, _decode_average), "decode": (_decode_average,),
        "trained_decode": (VTP._decode,), "discriminate": (_discriminate,),
    }
    _DECODING: ClassVar[frozenset[Leg]] = VTP._DECODING | {_decode_average}

    def averaged(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        if self.averaged_decoder is None:
            return []
        return list(zip(self.averaged_decoder.parameters(), self.pixel_decoder.parameters(), strict=True))
