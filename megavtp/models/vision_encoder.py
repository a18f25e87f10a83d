"""This is the ViT encoder ("trunk"), from patches to tokens and an optional bottleneck (VTP, arXiv 2512.13687).

Letters: b images, N patches, D width. A sequence has one class token, then the patches in row-major order.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from megavtp.config.sizes import ResolvedDecoder, ResolvedModel, ResolvedVision
from megavtp.errors import UserError
from megavtp.nn.attention import Attention
from megavtp.nn.attention_kernels import Kernel, Segments
from megavtp.nn.block import Block, Recompute, run_blocks
from megavtp.nn.drop_path import DropPlan
from megavtp.nn.feed_forward import feed_forward
from megavtp.nn.norms import NORMS
from megavtp.nn.rope import AxialRope
from megavtp.parallel.layers import RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.striping import Stripe, whole


class PatchEmbed(nn.Module):
    """Embeds images (b, channels, H, W) as patches (b, N, D) in row-major order."""

    def __init__(self, patch: int, width: int, channels: int = 3):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"an image of {height}x{width} pixels does not divide into patches of {self.patch}; resize or crop it"
            )
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


def vit_blocks(
    tower: ResolvedVision | ResolvedDecoder, mlp_ratio: float, numbers: Iterable[int], kernel: Kernel, mesh: Mesh
) -> nn.ModuleDict:
    """Make blocks of a ViT, by their numbers in the whole tower."""
    return nn.ModuleDict({
        str(number): Block(
            tower.width, Attention(tower.width, tower.heads, qk_norm=tower.qk_norm, kernel=kernel, mesh=mesh),
            feed_forward(tower.ffn, tower.width, mlp_ratio, mesh), NORMS[tower.norm], tower.layer_scale or None,
        )
        for number in numbers
    })


class VisionEncoder(nn.Module):
    """This encodes crops of several sizes at once; all tokens run through norms and linears as one packed tensor."""

    def __init__(
        self, config: ResolvedModel, mesh: Mesh = SINGLE, *, stripe: Stripe | None = None,
        recompute: Recompute = "none", attention: Kernel = "auto",
    ):
        super().__init__()
        vision = config.vision
        width = vision.width
        self.patch, self.recompute = config.patch_size, recompute
        self.stripe = stripe = stripe or whole(vision.depth)
        if stripe.first:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.mask_token = nn.Parameter(torch.empty(1, width))
            self.patch_embed = PatchEmbed(config.patch_size, width)
        self.rope_embed = AxialRope(width // vision.heads, config.rope_dtype)
        self.blocks = vit_blocks(vision, vision.mlp_ratio, stripe.blocks, attention, mesh)
        self.feature_bottleneck: RowParallelLinear | None = None
        if stripe.last:
            self.norm = NORMS[vision.norm](width)
        if stripe.last and config.bottleneck != width:
            mesh.tp_part(width, "the encoder width")
            self.feature_bottleneck = RowParallelLinear(
                width, config.bottleneck, bias=False, mesh=mesh, input_is_parallel=False
            )

    def forward(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None, drop: DropPlan | None = None,
        layers: Sequence[int] | None = None, normalise: bool = True, chunk: int | None = None,
        x: Tensor | None = None,
    ) -> list[Tensor] | list[list[Tensor]] | Tensor:
        """Return the tokens after the final norm, before the bottleneck, per crop size.

        Args:
            crops: images (b, 3, H, W), one tensor per crop size.
            masks: per crop size (b, N) bool, true = the patch is replaced by the mask token; or None.
            drop: stochastic-depth plan with one segment per crop size.
            layers: return the tokens after these blocks (negative numbers count from the end) instead of the last
                block's, as one list over crop sizes per block.
            normalise: apply the final norm to what is returned.
            chunk: run one chunk of the tower; None = all of it.
            x: packed tokens (T, D) that enter a chunk after the first, which reads only the shapes of crops and masks.

        Returns:
            A list of (b, 1 + N, D); with ``layers`` a list of such lists; from a chunk before the last packed tokens.
        """
        part = self.stripe.part(chunk)
        grids = [(crop.shape[-2] // self.patch, crop.shape[-1] // self.patch) for crop in crops]
        segments: Segments = tuple((len(crop), 1 + rows * columns) for crop, (rows, columns) in zip(crops, grids))
        tables = [self.rope_embed.tables(rows, columns, 1) for rows, columns in grids]
        if part.first:
            embedded = [self._embed(x, m) for x, m in zip(crops, masks or [None] * len(crops), strict=True)]
            x = embedded[0].flatten(0, 1) if len(embedded) == 1 else torch.cat([e.flatten(0, 1) for e in embedded])
        wanted = None if layers is None else [self._block_index(i) for i in layers]
        taken: dict[int, Tensor | None] = dict.fromkeys(wanted or ())
        blocks = [(index, self.blocks[str(index)]) for index in part.blocks]
        assert x is not None, "a chunk after the first is given its tokens"
        x = run_blocks(blocks, x, segments, tables, drop, self.recompute, taken)
        if not part.last:
            return x
        outputs = [x] if wanted is None else [cast(Tensor, taken[index]) for index in wanted]
        unpacked = [_unpack(self.norm(y) if normalise else y, segments) for y in outputs]
        return unpacked[0] if wanted is None else unpacked

    def bottleneck(self, features: Tensor) -> Tensor:
        """Map features (..., D) linearly to latent channels (..., bottleneck); the identity if the widths agree."""
        return features if self.feature_bottleneck is None else self.feature_bottleneck(features)

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        x = self.patch_embed(images)
        cls_token: Tensor = self.cls_token
        if mask is None:
            cls_token = cls_token + 0 * self.mask_token  # every parameter gets a gradient in every pass
        else:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return torch.cat([cls_token.expand(len(x), -1, -1), x], 1)

    def _block_index(self, layer: int) -> int:
        depth = self.stripe.depth
        if not -depth <= layer < depth:
            raise UserError(f"block {layer} was asked for, but the encoder has {depth} blocks")
        return layer % depth


def _unpack(x: Tensor, segments: Segments) -> list[Tensor]:
    pieces = x.split([sequences * length for sequences, length in segments])
    return [piece.unflatten(0, segment) for piece, segment in zip(pieces, segments)]
