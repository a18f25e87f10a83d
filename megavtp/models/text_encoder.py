"""This is the causal text encoder of CLIP (arXiv 2103.00020)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.sizes import ResolvedText, known
from megavtp.errors import UserError
from megavtp.nn.attention import Attention
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Block, Recompute, run_blocks
from megavtp.nn.feed_forward import MLP, quick_gelu
from megavtp.nn.norms import LayerNorm
from megavtp.parallel.layers import RowParallelLinear, VocabParallelEmbedding
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.striping import Stripe, whole

_norm = partial(LayerNorm, eps=1e-5)


class TextEncoder(nn.Module):
    """Maps token ids (b, context_length) to one feature (b, width) each.

    There is no padding mask: causality alone hides the zeros after the end token from the pooled position.
    """

    def __init__(
        self, config: ResolvedText, mesh: Mesh = SINGLE, *, stripe: Stripe | None = None,
        recompute: Recompute = "none", attention: Kernel = "auto",
    ):
        super().__init__()
        width = config.width
        self.pool, self.recompute = config.pool, recompute
        self.context_length = config.context_length
        vocabulary = known(config.vocab_size, "model.text.vocab_size")
        mesh.tp_part(vocabulary, "the vocabulary (model.text.vocab_size)")
        self.stripe = stripe = stripe or whole(config.depth)
        if stripe.first:
            self.token_embedding = VocabParallelEmbedding(vocabulary, width, mesh=mesh)
            self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        activation = quick_gelu if config.quick_gelu else F.gelu
        self.blocks = nn.ModuleDict({
            str(index): Block(
                width, Attention(width, config.heads, causal=config.causal, kernel=attention, mesh=mesh),
                MLP(width, int(width * config.mlp_ratio), activation=activation, mesh=mesh), _norm, config.layer_scale,
            )
            for index in stripe.blocks
        })
        self.projection: RowParallelLinear | None = None
        if stripe.last:
            self.norm = _norm(width)
        if stripe.last and config.projection == "linear":
            self.projection = RowParallelLinear(
                width, width, bias=config.projection_bias, mesh=mesh, input_is_parallel=False
            )

    def forward(self, tokens: Tensor, chunk: int | None = None, x: Tensor | None = None) -> Tensor:
        """Return features (b, width), not normalised. UserError if the captions have another length than the table.

        With ``chunk``, run one chunk of the tower: all after the first take the packed tokens ``x`` (T, width) as well,
        and all but the last return packed tokens.
        """
        part = self.stripe.part(chunk)
        if tokens.shape[1] != self.context_length:
            raise UserError(
                f"captions have {tokens.shape[1]} tokens, the text encoder takes {self.context_length}; set "
                "model.text.context_length to the tokenizer's length"
            )
        if part.first:
            x = (self.token_embedding(tokens) + self.positional_embedding).flatten(0, 1)
        segments = ((len(tokens), self.context_length),)
        blocks = [(index, self.blocks[str(index)]) for index in part.blocks]
        assert x is not None, "a chunk after the first is given its tokens"
        x = run_blocks(blocks, x, segments, recompute=self.recompute)
        if not part.last:
            return x
        x = self._pool(self.norm(x).unflatten(0, segments[0]), tokens)
        return x if self.projection is None else self.projection(x)

    def _pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.pool == "argmax":  # the end token has the largest id; the first one counts
            return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
        return x[:, 0] if self.pool == "first" else x[:, -1]
