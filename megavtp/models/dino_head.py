"""This is the DINO projection head (arXiv 2104.14294); one head serves class tokens and masked patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.schema import DinoHeadConfig
from megavtp.nn.compiling import Region
from megavtp.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sharding import Shard, mark


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Compute g v / |v| of each row, (K, d) and (K, 1) -> (K, d) (arXiv 1602.07868)."""
    return v * (g / v.norm(dim=1, keepdim=True))


def unit_rows(x: Tensor) -> Tensor:
    """Divide each row by its length: (n, d) -> (n, d).

    The length is computed in float32, but the result has the dtype of the compute: autocast on CUDA would leave
    float32, and the logits, the largest products of a step, would miss the fast 16-bit units.
    """
    return F.normalize(x.float(), dim=-1).to(x.dtype)


class Prototypes(nn.Module):
    """The weight-normalised last layer, rows cut over tp: forward() -> W = g v / |v|, (K / tp, bottleneck)."""

    normalise = Region(weight_norm)

    def __init__(self, bottleneck: int, prototypes: int, mesh: Mesh):
        super().__init__()
        local = mesh.tp_part(prototypes, "model.dino_head.prototypes")
        self.weight_g = nn.Parameter(torch.empty(local, 1))
        self.weight_v = nn.Parameter(torch.empty(local, bottleneck))
        mark(self.weight_g, Shard(0))
        mark(self.weight_v, Shard(0))

    def forward(self) -> Tensor:
        return self.normalise(self.weight_v, self.weight_g)


def head_widths(in_dim: int, config: DinoHeadConfig) -> list[int]:
    """Return the widths before, between and after the head's matrices, the prototypes included."""
    return [in_dim, *[config.hidden] * (config.layers - 1), config.bottleneck, config.prototypes]


def _mlp(sizes: list[int], mesh: Mesh) -> nn.Sequential:
    """Stack linears and GELU. The linears are column- and row-parallel in turn; an odd last one reads all of x."""
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        if index % 2 == 0 and index + 2 < len(sizes):
            mesh.tp_part(fan_out, "model.dino_head.hidden")
            layers.append(ColumnParallelLinear(fan_in, fan_out, mesh=mesh))
        else:
            mesh.tp_part(fan_in, "the DINO head's input or hidden width")
            layers.append(RowParallelLinear(fan_in, fan_out, mesh=mesh, input_is_parallel=index % 2 == 1))
        layers.append(nn.GELU())
    return nn.Sequential(*layers[:-1])


class DinoHead(nn.Module):
    """An MLP, an L2 norm, then the prototypes."""

    normalise = Region(unit_rows)

    def __init__(self, in_dim: int, config: DinoHeadConfig, mesh: Mesh = SINGLE):
        super().__init__()
        self.mlp = _mlp(head_widths(in_dim, config)[:-1], mesh)
        self.last_layer = Prototypes(config.bottleneck, config.prototypes, mesh)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, in_dim) -> unit features (n, bottleneck) and prototypes (K / tp, bottleneck).

        The loss computes the logits, features @ prototypes^T, itself: it never holds all (n, K) of them at once.
        """
        return self.normalise(self.mlp(x)), self.last_layer()
