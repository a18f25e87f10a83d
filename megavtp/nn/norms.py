"""Normalisation layers use apex's fused kernels on CUDA where apex is installed, and torch's own otherwise.

With ``cut`` (sequence parallelism) the input has only this rank's rows of the tokens. The result is cast to ``dtype``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.nn.compiling import Region
from megavtp.parallel.sequence import TokenCut, on_own_rows


@cache
def find_apex_norms() -> Any | None:
    """Return apex's functional norms if its compiled extension loads, which an import alone does not show."""
    try:
        from apex.normalization import FusedLayerNorm, FusedRMSNorm, fused_layer_norm

        FusedLayerNorm(8), FusedRMSNorm(8)  # their constructors load the compiled extension
    except (ImportError, OSError, RuntimeError):
        return None
    return fused_layer_norm


def _fused(x: Tensor, weight: Tensor) -> Any | None:
    """Return apex's norms if they are installed and take such tensors."""
    suits = x.is_cuda and x.dtype == weight.dtype and x.numel() > 0
    return find_apex_norms() if suits and not torch.compiler.is_compiling() else None


def _as_they_are() -> torch.autocast:
    """Return a context without autocast, in which apex would round a float32 input to 16 bits first."""
    return torch.autocast("cuda", enabled=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise x (..., width) with a weight (width,), and cast to ``dtype``; a 16-bit x is rounded before the weight
    is applied."""
    if (fused := _fused(x, weight)) is not None:
        with _as_they_are():
            y = fused.fused_rms_norm_affine(x, weight, weight.shape, eps)
    elif x.dtype == torch.float32:
        y = F.rms_norm(x, weight.shape, weight.float(), eps)
    else:
        y = F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight
    return y.to(dtype or y.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    if (fused := _fused(x, weight)) is not None:
        with _as_they_are():
            y = fused.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
    else:
        y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y.to(dtype or y.dtype)


class RMSNorm(nn.Module):
    """Computes x * rsqrt(mean(x^2) + eps) * weight over the last dimension; the statistics are in float32."""

    normalise = Region(rms_norm)

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, cut: TokenCut | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.normalise(x, on_own_rows(self.weight, cut), self.eps, dtype)


class LayerNorm(nn.Module):
    normalise = Region(layer_norm)

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, cut: TokenCut | None = None, dtype: torch.dtype | None = None) -> Tensor:
        weight, bias = on_own_rows(self.weight, cut), on_own_rows(self.bias, cut)
        return self.normalise(x, weight, bias, self.eps, dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rmsnorm": RMSNorm,
    "layernorm": lambda width: LayerNorm(width, 1e-6),
    "layernormbf16": lambda width: LayerNorm(width, 1e-5),
}
