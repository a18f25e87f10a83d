"""What a DiT's training holds: the DiT and the moving average of its weights, which samples are drawn with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from megavtp.config.dit import DiTModelConfig, resolve_dit
from megavtp.models.build import realised
from megavtp.models.dit import DiT
from megavtp.models.dit_build import initialise_dit
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute
from megavtp.parallel.mesh import SINGLE, Mesh


class AveragedDiT(nn.Module):
    """``dit`` learns, ``ema`` follows it. ``forward(mode, ...)`` is the only entry, as sharding engines hook the root
    module's forward.

    compute_dtype: of the matrix products (autocast); parameters stay float32.
    """

    def __init__(
        self, config: DiTModelConfig, mesh: Mesh = SINGLE, *, recompute: Recompute = "none", attention: Kernel = "auto",
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.compute_dtype = compute_dtype
        self.dit = DiT(config, mesh, recompute=recompute, attention=attention)
        self.ema = DiT(config, mesh, attention=attention).requires_grad_(False)

    def forward(self, mode: str, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocities, see ``DiT.forward``: ``mode`` "velocity" of the trained weights, "average" of the averaged."""
        with self._precision(x.device.type):
            return (self.dit if mode == "velocity" else self.ema)(x, t, y)

    def _precision(self, device: str) -> AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        # A forward reads each weight once: a cache of cast weights would only hold a 16-bit copy of the model.
        return torch.autocast(device, dtype=self.compute_dtype, cache_enabled=False)

    def averaged(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(average, trained) parameters, always in the same order."""
        return list(zip(self.ema.parameters(), self.dit.parameters(), strict=True))

    def start_average(self) -> None:
        """Make the average a copy of the trained weights."""
        with torch.no_grad():
            for average, trained in self.averaged():
                average.copy_(trained)


def build_averaged_dit(
    config: DiTModelConfig, mesh: Mesh = SINGLE, *, seed: int = 0, device: torch.device | str = "cpu",
    recompute: Recompute = "none", attention: Kernel = "auto", compute_dtype: torch.dtype = torch.float32,
) -> AveragedDiT:
    """In float32 on ``device``, initialised; the same full weights for every ``mesh``."""
    with torch.device("meta"):
        model = AveragedDiT(
            resolve_dit(config), mesh, recompute=recompute, attention=attention, compute_dtype=compute_dtype
        )
    with realised(model, device):
        initialise_dit(model.dit, mesh, seed)
        model.ema.reset_positions()
        model.start_average()
    return model
