"""This is the ViT that decodes latents to images (VTP, arXiv 2512.13687)."""

import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.sizes import DECODER_MLP_RATIO, ResolvedModel
from megavtp.models.vision_encoder import vit_blocks
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute, run_blocks
from megavtp.nn.norms import NORMS
from megavtp.nn.rope import AxialRope
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.striping import Stripe, whole


class PixelDecoder(nn.Module):
    """Maps latents (b, bottleneck, h, w) to images (b, 3, h * patch, w * patch), normalised as the encoder's input."""

    def __init__(
        self, config: ResolvedModel, mesh: Mesh = SINGLE, *, stripe: Stripe | None = None,
        recompute: Recompute = "none", attention: Kernel = "auto",
    ):
        super().__init__()
        decoder, width = config.decoder, config.decoder.width
        self.patch, self.recompute = config.patch_size, recompute
        self.stripe = stripe = stripe or whole(decoder.depth)
        if stripe.first:
            self.proj_in = nn.Conv2d(config.bottleneck, width, 1)
        self.rope_embed = AxialRope(width // decoder.heads, config.rope_dtype)
        self.blocks = vit_blocks(decoder, DECODER_MLP_RATIO, stripe.blocks, attention, mesh)
        if stripe.last:
            self.norm = NORMS[decoder.norm](width)
            self.proj_out = nn.Conv2d(width, 3 * config.patch_size**2, 1)

    def forward(
        self, latents: Tensor, chunk: int | None = None, x: Tensor | None = None, with_head_input: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return images; with ``chunk``, run one chunk of the tower. The first takes latents, a later one packed tokens
        ``x`` (T, width) and only the shape of the latents; all but the last return packed tokens.

        ``with_head_input``: beside the images, return what the last layer reads (b, width, h, w), without gradient.
        """
        part = self.stripe.part(chunk)
        batch, _, rows, columns = latents.shape
        if part.first:
            dtype = self.proj_in.weight.dtype
            x = self.proj_in(latents.to(dtype)).to(dtype)  # under autocast too the residual stream is float32
            x = x.flatten(2).transpose(1, 2).flatten(0, 1)
        segments = ((batch, rows * columns),)
        tables = [self.rope_embed.tables(rows, columns)]
        blocks = [(index, self.blocks[str(index)]) for index in part.blocks]
        assert x is not None, "a chunk after the first is given its tokens"
        x = run_blocks(blocks, x, segments, tables, recompute=self.recompute)
        if not part.last:
            return x
        x = self.norm(x).unflatten(0, (batch, rows, columns)).permute(0, 3, 1, 2)
        images = F.pixel_shuffle(self.proj_out(x), self.patch)
        return (images, x.detach()) if with_head_input else images
