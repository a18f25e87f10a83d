"""What a precision means: its type, and what ``auto`` is on this machine."""

from dataclasses import replace

import torch

from megavtp.config.run import ParallelConfig, Precision

_CPU_FEATURES = ("avx512_bf16", "amx_bf16")  # other CPUs emulate bfloat16 products, which is slower than float32


def compute_dtype(precision: Precision) -> torch.dtype:
    """Return the type in which "bf16" or "fp32" computes, or "auto" on this machine."""
    return torch.bfloat16 if resolved(precision) == "bf16" else torch.float32


def with_precision(parallel: ParallelConfig) -> ParallelConfig:
    """Resolve "auto": bf16 on GPUs and CPUs that multiply bfloat16 natively, otherwise fp32.

    Every process decides for its own machine, so a run on machines of several kinds must name a precision.
    """
    return replace(parallel, precision=resolved(parallel.precision))


def resolved(precision: Precision) -> Precision:
    """Return "bf16" or "fp32"; of "auto", that which this machine gets."""
    if precision != "auto":
        return precision
    return "bf16" if _has_native_bfloat16() else "fp32"


def _has_native_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(feature) for feature in _CPU_FEATURES)
