"""The causal text encoder of CLIP (arXiv 2103.00020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.schema import TextConfig
from megavtp.errors import UserError
from megavtp.nn.attention import Attention
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Block, Recompute
from megavtp.nn.feed_forward import MLP, quick_gelu
from megavtp.nn.norms import LayerNorm
from megavtp.nn.split import share
from megavtp.nn.stack import run_blocks
from megavtp.parallel.layers import RowParallelLinear, VocabParallelEmbedding
from megavtp.parallel.mesh import SINGLE, Mesh


def _norm(width: int) -> LayerNorm:
    return LayerNorm(width, 1e-5)


class TextEncoder(nn.Module):
    """Token ids (b, context_length) -> one feature (b, width) each.

    There is no padding mask: zeros after the end token are hidden from the pooled position by causality alone.
    """

    def __init__(
        self, config: TextConfig, mesh: Mesh = SINGLE, *, recompute: Recompute = "none", attention: Kernel = "auto"
    ):
        super().__init__()
        width = config.width
        self.pool, self.recompute = config.pool, recompute
        self.context_length = config.context_length
        share(config.vocab_size, mesh, "the vocabulary (model.text.vocab_size)")
        self.token_embedding = VocabParallelEmbedding(config.vocab_size, width, mesh=mesh)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        activation = quick_gelu if config.quick_gelu else F.gelu
        self.blocks = nn.ModuleList(
            Block(
                width, Attention(width, config.heads, causal=config.causal, kernel=attention, mesh=mesh),
                MLP(width, int(width * config.mlp_ratio), activation=activation, mesh=mesh), _norm, config.layer_scale,
            )
            for _ in range(config.depth)
        )
        self.norm = _norm(width)
        self.projection = None
        if config.projection == "linear":
            self.projection = RowParallelLinear(
                width, width, bias=config.projection_bias, mesh=mesh, input_is_parallel=False
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (b, width), not normalised. UserError when the captions have another length than the table."""
        if tokens.shape[1] != self.context_length:
            raise UserError(
                f"captions have {tokens.shape[1]} tokens, the text encoder takes {self.context_length}; set "
                "model.text.context_length to the tokenizer's length"
            )
        x = self.token_embedding(tokens) + self.positional_embedding
        segments = (tuple(tokens.shape),)
        x = run_blocks(enumerate(self.blocks), x.flatten(0, 1), segments, recompute=self.recompute)
        x = self._pool(self.norm(x).unflatten(0, segments[0]), tokens)
        return x if self.projection is None else self.projection(x)

    def _pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.pool == "argmax":  # the end token has the largest id; the first one counts
            return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
        return x[:, 0] if self.pool == "first" else x[:, -1]
