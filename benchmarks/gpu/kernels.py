"""The device's rates, and the kernels of other packages beside torch's own.

Letters: T packed tokens, H heads, h channels of a head.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measure import attempt
from benchmarks.side_by_side import difference
from benchmarks.step import timed
from megavtp.errors import UserError
from megavtp.nn.attention_kernels import Segments, Varlen, attend, import_flash, import_torch, sequence_offsets
from megavtp.nn.norms import find_apex_norms
from megavtp.training.optimizer import find_apex_adam

_HEADS, _HEAD = 16, 64
_TIMES, _CALLS = 5, 20  # so many times so many calls, since a wait for the device costs as much as a short kernel
_AGREES = 1e-3  # an error this small is one of rounding, whatever torch's own is


def compare(_: str, rehearse: bool) -> None:
    """Tell the rates first, which the parts on steps are compared with."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    attempt("bf16 products", lambda: product_rate(256 if rehearse else 8192, device))
    attempt("copy", lambda: copy_rate(2**20 if rehearse else 2**30, device))
    # The crops of self-distillation in VTP-L: global ones of 224 pixels and local ones of 96, with class tokens.
    segments = ((2, 5), (3, 2)) if rehearse else ((128, 197), (512, 37))
    attempt("attention by crop size", lambda: compare_attention(_by_crop_size, segments, device))
    for name, module in (
        ("torch varlen", "torch.nn.attention.varlen"), ("FlashAttention 2", "flash_attn"),
        ("FlashAttention 3", "flash_attn_interface"),
    ):
        attempt(name, lambda module=module: compare_attention(_varlen(module), segments, _needs_gpu(device)))
    shape = (64, 64) if rehearse else (65_536, 1024)
    attempt("apex RMSNorm", lambda: compare_norm("fused_rms_norm_affine", shape, device))
    attempt("apex LayerNorm", lambda: compare_norm("fused_layer_norm_affine", shape, device))
    attempt("apex AdamW", lambda: compare_adamw(shape, device))


def product_rate(side: int, device: torch.device) -> dict[str, float]:
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _pace(lambda: a @ b, device)
    return {"seconds": seconds, "flops_per_second": 2 * side**3 / seconds}


def copy_rate(size: int, device: torch.device) -> dict[str, float]:
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = _pace(lambda: target.copy_(source), device)
    return {"seconds": seconds, "bytes_per_second": 2 * size / seconds}


def _pace(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call among others."""
    def calls() -> None:
        for _ in range(_CALLS):
            call()

    return timed(calls, device, _TIMES, untimed=1) / _CALLS


def _varlen(module: str) -> Callable[[Tensor, Tensor, Tensor, Segments], Tensor]:
    """Return the kernel of a package. ImportError says why it cannot be had, where a run would take another kernel."""
    importlib.import_module(module)
    kernel: Varlen | None = import_torch() if module.startswith("torch.") else import_flash(module)
    if kernel is None:
        raise UserError("installed, but without a kernel of a known signature")

    def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        longest = max(length for _, length in segments)
        return kernel(q, k, v, sequence_offsets(segments, q.device), longest, False)

    return attention


def _needs_gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        raise UserError("needs a CUDA device")
    return device


def _by_crop_size(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return attend(q, k, v, segments, kernel="sdpa")


def compare_attention(
    attention: Callable[[Tensor, Tensor, Tensor, Segments], Tensor], segments: Segments, device: torch.device
) -> dict[str, Any]:
    tokens = sum(sequences * length for sequences, length in segments)
    q, k, v = (torch.randn(tokens, _HEADS, _HEAD, device=device, dtype=torch.bfloat16) for _ in range(3))
    return _compare(lambda *x: attention(*x, segments), lambda *x: _by_crop_size(*x, segments), (q, k, v))


def compare_norm(name: str, shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    apex = find_apex_norms()
    if apex is None:
        raise UserError("not installed, or without its compiled extension")
    width, layer = (shape[1],), "layer" in name
    x, weight, bias = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in (shape, width, width))
    inputs = (x, weight, bias) if layer else (x, weight)

    def own(x: Tensor, *affine: Tensor) -> Tensor:
        return F.layer_norm(x, width, *affine, 1e-6) if layer else F.rms_norm(x, width, *affine, 1e-6)

    return _compare(lambda x, *affine: getattr(apex, name)(x, *affine, width, 1e-6), own, inputs)


def _compare(
    kernel: Callable[..., Tensor], own: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Compare results and gradients of a kernel and of torch's own with the latter's in float32; time both."""
    factor = torch.randn_like(inputs[0])

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own_inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*own_inputs)
        return [out.detach(), *torch.autograd.grad(out, own_inputs, factor.to(dtype))]

    exact, device, dtype = run(own, torch.float32), inputs[0].device, inputs[0].dtype
    error, torch_error = (difference(run(f, dtype), exact) for f in (kernel, own))
    return {
        "error": error, "torch_error": torch_error, "agrees": error <= max(2 * torch_error, _AGREES),
        "seconds": _pace(lambda: run(kernel, dtype), device), "torch_seconds": _pace(lambda: run(own, dtype), device),
    }


def compare_adamw(shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    apex = find_apex_adam()
    if apex is None:
        raise UserError("not installed, or without its kernels")
    start, gradient = torch.randn(shape, device=_needs_gpu(device)), torch.randn(shape, device=device)
    weights, seconds = [], []
    for make in (lambda p: apex(p, adam_w_mode=True, lr=1e-3, weight_decay=0.1),
                 lambda p: torch.optim.AdamW(p, fused=True, lr=1e-3, weight_decay=0.1)):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        seconds.append(_pace(make([weight]).step, device))
        weights.append(weight.detach())
    error = difference([weights[0] - start], [weights[1] - start])
    return {"error": error, "agrees": error <= _AGREES, "seconds": seconds[0], "torch_seconds": seconds[1]}
