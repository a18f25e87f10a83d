"""This builds a DiT with LightningDiT's initial values, the same on every layout, or fills it from whole tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megavtp.dit.config import DiTModelConfig, complete_dit
from megavtp.dit.model.model import DiT
from megavtp.models.build import realised
from megavtp.models.fitting import load_whole
from megavtp.models.init import Fill, constant, fill_parameters, normal
from megavtp.nn.attention_kernels import Kernel
from megavtp.parallel.mesh import SINGLE, Mesh


def _xavier(t: Tensor, g: torch.Generator) -> Tensor:
    """Draw Xavier's uniform values for a weight seen as a matrix (outputs, all inputs of each)."""
    bound = math.sqrt(6 / (t.shape[0] + t[0].numel()))
    return t.uniform_(-bound, bound, generator=g)


# Adaptive norms and the last layer start at zero, so the first output is 0 and every block is the identity.
_RULES: list[tuple[str, Fill]] = [
    (r".*norm\w*\.weight", constant(1.0)),
    (r".*\.adaLN_modulation\.1\.(weight|bias)", constant(0.0)),
    (r"final_layer\.linear\.(weight|bias)", constant(0.0)),
    (r".*\.bias", constant(0.0)),
    (r"y_embedder\.embedding_table\.weight", normal(0.02)),
    (r"[ty]_embedder\.mlp\.[02]\.weight", normal(0.02)),
    (r".*\.weight", _xavier),
]


def initialise_dit(model: DiT, mesh: Mesh, seed: int) -> None:
    """Fill every parameter of a DiT, whole or a part of its blocks, and its positions."""
    fill_parameters(model.named_parameters(), _RULES, mesh, seed)
    model.reset_positions()


def build_dit(
    config: DiTModelConfig, mesh: Mesh = SINGLE, *, seed: int = 0, device: torch.device | str = "cpu",
    attention: Kernel = "auto",
) -> DiT:
    """Build a whole, initialised DiT in float32."""
    with torch.device("meta"):
        model = DiT(complete_dit(config), mesh, attention=attention)
    with realised(model, device):
        initialise_dit(model, mesh, seed)
    return model


def load_full_dit(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole (uncut) tensors into this rank's slices, by LightningDiT's keys; the fixed positions may be left out.

    UserError names everything that is missing, unexpected or of the wrong shape; then nothing is copied.
    """
    load_whole(model, tensors, model.mesh, [name for name, _ in model.named_parameters()])
