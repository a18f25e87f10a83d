"""Training holds the DiT and the moving average of its weights, with which samples are drawn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megavtp.dit.config import CompleteDiT, ResolvedDiT, swiglu_hidden
from megavtp.dit.model.model import Activations, DiT
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute
from megavtp.nn.precision import computing_in
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.striping import ActivationSpec, Stripe, cut_tower


class AveragedDiT(nn.Module):
    """``dit`` learns, ``ema`` follows it. ``forward(mode, ...)`` is the only entry, as sharding engines hook the root
    module's forward.

    Under pipeline parallelism both hold this rank's chunks only. Matrix products are in ``compute_dtype`` (autocast),
    parameters stay float32.
    """

    def __init__(
        self, config: CompleteDiT, mesh: Mesh = SINGLE, *, recompute: Recompute = "none", attention: Kernel = "auto",
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config, self.mesh, self.compute_dtype = config, mesh, compute_dtype
        stripe = Stripe(dit_cuts(config, mesh.chunks), mesh.pp, mesh.pp_rank)
        self.dit = DiT(config, mesh, stripe=stripe, recompute=recompute, attention=attention)
        self.ema = DiT(config, mesh, stripe=stripe, attention=attention).requires_grad_(False)

    def forward(
        self, mode: str, stage: int | None = None, activations: Sequence[Tensor] = (), *,
        x: Tensor, t: Tensor, y: Tensor,
    ) -> Tensor | Activations:
        """Predict velocities as ``DiT.forward`` does: ``mode`` "velocity" uses the trained weights, "average" the
        averaged ones.

        With ``stage``, run only that chunk, which this rank must hold; all after the first read only ``activations``.
        """
        with computing_in(self.compute_dtype, self.dit.feat_rope.freqs_cos.device):
            return (self.dit if mode == "velocity" else self.ema)(x, t, y, stage, *activations)

    def legs(self, mode: str) -> int:
        return 1

    def activation_specs(self, mode: str, stage: int, *, x: Tensor, **_: Any) -> list[ActivationSpec]:
        tokens = (self.config.latent_size // self.config.patch_size) ** 2
        shapes = (len(x), tokens, self.config.width), (len(x), self.config.width)
        return [(shape, torch.float32) for shape in shapes]

    def averaged(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pair (average, trained) parameters, always in the same order."""
        return list(zip(self.ema.parameters(), self.dit.parameters(), strict=True))

    def start_average(self) -> None:
        with torch.no_grad():
            for average, trained in self.averaged():
                average.copy_(trained)


def dit_cuts(config: ResolvedDiT, chunks: int) -> tuple[range, ...]:
    """Return the block numbers of each pipeline chunk, balanced by the weights used per token."""
    block = 4 * config.width + 3 * swiglu_hidden(config.width)
    ends = config.patch_size**2 * (config.latent_channels or 0) / block
    return cut_tower([1.0] * config.depth, chunks, first=ends, last=ends)
