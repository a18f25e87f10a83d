"""Matrix products in 16 bits, with weights in float32."""

from contextlib import AbstractContextManager, nullcontext

import torch


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Make the matrix products of a model in ``dtype`` while the context is entered; float32 changes nothing."""
    if dtype == torch.float32:
        return nullcontext()
    # A forward reads each weight once. The cache of cast weights would only keep a 16-bit copy of the whole model
    # until its end, also of what ZeRO-3 or recomputation has released.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
