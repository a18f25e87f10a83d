"""The weights that the optimizer updates are the model's own partition, not a copy of it.

DeepSpeed keeps a copy for models in 16 bits. MegaVTP's weights are float32, so that the copy would hold the same
numbers: four bytes for each parameter of a partition, and a pass over them in each step. See ``deepspeed_adapter`` for
the version of DeepSpeed and the tests.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def share_master_weights(engine: Any, dp_rank: int) -> None:
    """Let a ZeRO engine's optimizer update the weights where the model reads them.

    DeepSpeed copies what is updated to the model's partition after each step; torch copies nothing onto itself.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        weights = optimizer.fp16_partitioned_groups_flat
        masters = optimizer.fp32_partitioned_groups_flat
        optimizer.flatten = joined
    else:
        weights = [partitions[dp_rank] for partitions in optimizer.parallel_partitioned_bit16_groups]
        masters = optimizer.single_partition_of_fp32_groups
    for master, weight in zip(masters, weights, strict=True):
        master.data = weight.data
    if stage < 3:
        optimizer._link_all_hp_params()  # each parameter knows where its master weights are


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the numbers of all tensors, one after the other: without a copy where they lie so in memory.

    ZeRO 3's gradients do, but DeepSpeed copies them for the update.
    """
    first = tensors[0]
    begins = accumulate((tensor.numel() for tensor in tensors), initial=first.storage_offset())
    # Not by addresses, which tensors without data do not have.
    if all(
        tensor.is_contiguous() and tensor.storage_offset() == begin and tensor.dtype == first.dtype
        and tensor.untyped_storage()._cdata == first.untyped_storage()._cdata
        for begin, tensor in zip(begins, tensors)
    ):
        return first.as_strided((sum(map(Tensor.numel, tensors)),), (1,))
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
