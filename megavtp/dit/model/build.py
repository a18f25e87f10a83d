"""This builds a DiT with LightningDiT's initial values, the same on every layout."""

import math

import torch
from torch import Tensor

from megavtp.dit.config import DiTModelConfig, complete_dit
from megavtp.dit.model.average import AveragedDiT
from megavtp.dit.model.model import DiT
from megavtp.models.build import realised
from megavtp.models.init import Fill, constant, fill_parameters, normal
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute
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


def _initialise(model: DiT, mesh: Mesh, seed: int) -> None:
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
        _initialise(model, mesh, seed)
    return model


def build_averaged_dit(
    config: DiTModelConfig, mesh: Mesh = SINGLE, *, seed: int = 0, device: torch.device | str = "cpu",
    recompute: Recompute = "none", attention: Kernel = "auto", compute_dtype: torch.dtype = torch.float32,
) -> AveragedDiT:
    """Build a DiT and its average, initialised, in float32; the whole weights are the same for every ``mesh``."""
    with torch.device("meta"):
        model = AveragedDiT(
            complete_dit(config), mesh, recompute=recompute, attention=attention, compute_dtype=compute_dtype
        )
    with realised(model, device):
        _initialise(model.dit, mesh, seed)
        model.ema.reset_positions()
        model.start_average()
    return model
