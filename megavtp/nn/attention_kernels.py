"""``attend`` chooses the kernel that computes attention; the choice never changes the result beyond rounding.

Letters: T tokens of all sequences, H local heads, h head dimension, b sequences of length L in one segment.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.errors import UserError
from megavtp.parallel.collectives import is_first

log = logging.getLogger(__name__)

Kernel = Literal["auto", "flash", "sdpa"]
Segments = tuple[tuple[int, int], ...]  # (sequences, length) per crop size, in the order they are packed
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]  # q, k, v, offsets, longest, causal


@cache
def find_varlen(hopper: bool) -> Varlen | None:
    """Find a variable-length kernel: FlashAttention 3's for Hopper GPUs, else flash-attn's, else torch's, else None."""
    return (import_flash("flash_attn_interface") if hopper else None) or import_flash("flash_attn") or import_torch()


def import_flash(module: str) -> Varlen | None:
    """Return the kernel of FlashAttention 3 (``flash_attn_interface``) or flash-attn (``flash_attn``), None without it.

    An import of what is called decides: a package can lack its compiled part, have it for another torch, or be a mere
    folder that another one left (flash-attn-4 has no ``flash_attn/__init__.py``). The first rank's log tells of these.
    """
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
    except Exception as error:  # whatever its code raises: nothing depends on this package
        if is_first() and not (isinstance(error, ModuleNotFoundError) and error.name == module):
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            log.warning("%s is installed, but cannot be used (%s): another kernel computes attention", module, reason)
        return None

    def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, causal: bool) -> Tensor:
        result = function(q, k, v, offsets, offsets, longest, longest, causal=causal)
        return result[0] if isinstance(result, tuple) else result  # first releases of 3 add the log-sum-exp

    return varlen


def import_torch() -> Varlen | None:
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        return adapt_torch_varlen(varlen_attn)
    return None


def adapt_torch_varlen(varlen_attn: Callable[..., Any]) -> Varlen | None:
    """Wrap torch's kernel, whose first releases take ``is_causal`` and later ones ``window_size``."""
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" in parameters:
        return lambda q, k, v, cu, longest, causal: varlen_attn(
            q, k, v, cu, cu, longest, longest, window_size=(-1, 0 if causal else -1)
        )
    if "is_causal" in parameters:
        return lambda q, k, v, cu, longest, causal: varlen_attn(q, k, v, cu, cu, longest, longest, is_causal=causal)
    return None


def check_kernel(kernel: Kernel) -> None:
    """Raise UserError if ``kernel`` asks for what this installation does not have."""
    if kernel == "flash" and find_varlen(hopper=True) is None:
        raise UserError(
            "parallel.attention=flash, but neither FlashAttention 3, flash-attn nor torch's variable-length attention "
            "can be imported; install flash-attn or set parallel.attention=auto"
        )


def _varlen_of(q: Tensor) -> Varlen | None:
    """Return the variable-length kernel if there is one that takes such tensors."""
    suits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    generation = torch.cuda.get_device_capability(q.device)[0] if suits else 0
    return find_varlen(hopper=generation == 9) if generation >= 8 else None


def spans(segments: Segments) -> list[slice]:
    """Return where each segment's tokens are among all."""
    ends = accumulate((sequences * length for sequences, length in segments), initial=0)
    return [slice(start, end) for start, end in pairwise(ends)]


def sequence_offsets(segments: Segments, device: torch.device) -> Tensor:
    """Return every sequence's start and the last one's end, (sequences + 1,) int32, without a copy from the host."""
    places = spans(segments)
    starts = [
        torch.arange(place.start, place.stop, length, dtype=torch.int32, device=device)
        for (_, length), place in zip(segments, places)
    ]
    return torch.cat([*starts, torch.full((1,), places[-1].stop, dtype=torch.int32, device=device)])


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool = False, kernel: Kernel = "auto"
) -> Tensor:
    """Compute softmax(q k^T / sqrt(h)) v in each sequence of a packed batch; inputs and result are (T, H, h).

    Where the tensors allow it (CUDA, 16-bit, h <= 256), one variable-length call serves all crop sizes; with "auto"
    only if there are several, as torch's scaled_dot_product_attention has a flash kernel of its own for one. That
    function, called once per crop size, serves everything else, also under "flash" (say, decoding in float32). On a CPU
    it computes 16-bit tensors in float32: for some hundred tokens its 16-bit kernels take two to six times as long.
    """
    segments = tuple((sequences, length) for sequences, length in segments if sequences)
    if not segments:
        return q + k + v  # there are no tokens: the result is empty, but in the graph
    wants_varlen = kernel == "flash" or (kernel == "auto" and len(segments) > 1)
    if wants_varlen and (varlen := _varlen_of(q)) is not None:
        longest = max(length for _, length in segments)
        return varlen(q, k, v, sequence_offsets(segments, q.device), longest, causal)
    if len(segments) == 1:
        return _attend_alike(q, k, v, segments[0], causal)
    # The gradient of a split is one tensor. Slices would each give one of full size, mostly zeros.
    lengths = [sequences * length for sequences, length in segments]
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), segments)
    return torch.cat([_attend_alike(*piece, causal) for piece in pieces])


def _attend_alike(q: Tensor, k: Tensor, v: Tensor, segment: tuple[int, int], causal: bool) -> Tensor:
    """Attend in sequences of one length."""
    q, k, v = (x.unflatten(0, segment).transpose(1, 2) for x in (q, k, v))
    return _sdpa(q, k, v, causal).transpose(1, 2).flatten(0, 1)


def _suits_float32(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if not _suits_float32(q):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with torch.autocast("cpu", enabled=False):  # autocast would make it 16-bit again
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal).to(q.dtype)
