"""The diffusion transformer that generates latents is LightningDiT (arXiv 2501.01423), as VTP uses it.

Letters: b samples, C channels, H = W latent positions, p patch, N = (H / p)^2 tokens, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.sizes import known
from megavtp.dit.config import CompleteDiT
from megavtp.dit.model.block import DiTBlock, FinalLayer
from megavtp.dit.model.embed import CaptionEmbed, ClassEmbed, TimeEmbed
from megavtp.dit.model.positions import pair_table, position_tables
from megavtp.errors import UserError
from megavtp.models.vision_encoder import PatchEmbed
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute, run_block
from megavtp.nn.rope import packed_table
from megavtp.parallel.collectives import copy_to_tp
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sequence import TokenCut
from megavtp.parallel.striping import Stripe, whole

Activations = tuple[Tensor, Tensor]  # go between chunks: tokens (b, N, D), sum of the embeddings (b, D)


class PairRope(nn.Module):
    """The rotary table as LightningDiT's checkpoints hold it."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, side: int):
        super().__init__()
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(side * side, head_dim))


class DiT(nn.Module):
    """Predicts the velocity of noisy latents from their time and a class or caption; it has LightningDiT's keys.

    Parameters are uninitialised: use ``dit.model.build.build_dit``.

    Args:
        config: the model, with the size that its condition needs.
        mesh: tensor-parallel layout.
        stripe: the blocks on this rank; None = all.
        recompute, attention: see ``nn.block`` and ``nn.attention_kernels``.
    """

    pos_embed: Tensor

    def __init__(
        self, config: CompleteDiT, mesh: Mesh = SINGLE, *, stripe: Stripe | None = None,
        recompute: Recompute = "none", attention: Kernel = "auto",
    ):
        super().__init__()
        self.config, self.mesh, self.recompute = config, mesh, recompute
        self.stripe = stripe or whole(config.depth)
        width, patch, channels = config.width, config.patch_size, config.latent_channels
        self.side = config.latent_size // patch
        if self.stripe.first:
            self.register_buffer("pos_embed", torch.empty(1, self.side**2, width))
            self.x_embedder = PatchEmbed(patch, width, channels)
            self.t_embedder = TimeEmbed(width, mesh)
            self.y_embedder: ClassEmbed | CaptionEmbed
            if config.condition == "class":
                self.y_embedder = ClassEmbed(known(config.num_classes, "model.num_classes"), width)
            else:
                self.y_embedder = CaptionEmbed(known(config.caption_width, "model.caption_width"), width, mesh)
        self.feat_rope = PairRope(width // config.heads, self.side)
        self.blocks = nn.ModuleDict({
            str(index): DiTBlock(width, config.heads, qk_norm=config.qk_norm, kernel=attention, mesh=mesh)
            for index in self.stripe.blocks
        })
        if self.stripe.last:
            self.final_layer = FinalLayer(width, patch * patch * channels, mesh)

    def reset_positions(self) -> None:
        """Fill the buffers; needed after a build on the meta device."""
        tables = position_tables(self.config)
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                buffer.copy_(tables[name])

    def forward(
        self, x: Tensor | None, t: Tensor | None, y: Tensor | None, chunk: int | None = None, *activations: Tensor
    ) -> Tensor | Activations:
        """Predict the velocity (b, C, H, W), from noise to data.

        Args:
            x: latents (b, C, H, W), normalised by the tokenizer's statistics, between noise (t = 0) and data (t = 1).
            t: (b,) in [0, 1].
            y: labels (b,), ``num_classes`` for none; or unit caption features (b, E), zeros for none.
            chunk: run only that chunk. All but the last return activations, and the next takes these in place of x, t
                and y.
        """
        part = self.stripe.part(chunk)
        if part.first:
            assert x is not None and t is not None and y is not None, "the first chunk reads latents, times, conditions"
            tokens, embedding = self.embed(x, t, y)
        else:
            tokens, embedding = activations
        condition = copy_to_tp(F.silu(embedding), self.mesh)
        tokens = self._run_blocks(part.blocks, tokens, condition)
        return self._velocity(tokens, condition) if part.last else (tokens, embedding)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> Activations:
        """Embed latents as tokens with positions, and time and condition as one vector."""
        expected = (self.config.latent_channels, self.config.latent_size, self.config.latent_size)
        if tuple(x.shape[1:]) != expected:
            raise UserError(f"latents of shape {tuple(x.shape[1:])} do not fit this DiT, which takes {expected}")
        # Both stay in float32 through all blocks, whatever the compute.
        return self.x_embedder(x) + self.pos_embed, (self.t_embedder(t) + self.y_embedder(y)).float()

    def no_condition(self, count: int) -> Tensor:
        """Return ``y`` for ``count`` samples without class or caption, as guidance needs it."""
        return self.y_embedder.none(count, self.pos_embed.device)

    def _run_blocks(self, indices: Sequence[int], tokens: Tensor, condition: Tensor) -> Tensor:
        """Run the blocks on tokens (b, N, D). Under sequence parallelism the tp ranks share each sample's tokens inside
        this function; input and output are whole, and the same on each rank."""
        if not indices:
            return tokens
        samples, cut = len(tokens), None
        table = pair_table(self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        table = packed_table([table], [(samples, tokens.shape[1])])
        if self.mesh.sequence_parallel:
            cut = TokenCut(self.mesh, tokens.shape[0] * tokens.shape[1], sequences=samples)
            tokens = cut.split(tokens.flatten(0, 1)).unflatten(0, (samples, -1))
        for index in indices:
            tokens = run_block(self.blocks[str(index)], self.recompute, tokens, condition, table, cut)
        return tokens if cut is None else cut.join(tokens.flatten(0, 1)).unflatten(0, (samples, -1))

    def _velocity(self, tokens: Tensor, condition: Tensor) -> Tensor:
        patch, side = self.config.patch_size, self.side
        patches = self.final_layer(tokens, condition).unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # channels are innermost in a token
