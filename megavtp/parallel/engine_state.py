"""The weights and Adam's moments as whole tensors, out of DeepSpeed's engine and into it, on any ZeRO stage.

All functions that take the engine are collective over the data-parallel group. See ``deepspeed_adapter`` for the
version of DeepSpeed and the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def stored(parameter: nn.Parameter) -> Tensor:
    """Return what this rank stores of a parameter: its ZeRO-3 partition, or all of it."""
    return getattr(parameter, "ds_tensor", parameter).data


def gathered_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return torch's or apex's optimizer, which DeepSpeed's may wrap."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def flat_partitions(engine: Any) -> list[Tensor]:
    """Return the float32 tensors that the optimizer updates on this rank."""
    stage = _stage(engine)
    if stage == 0:
        return [p for p in engine.module.parameters() if p.requires_grad]
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def ensure_optimizer_state(engine: Any) -> None:
    """Create Adam's state where no step has made it yet, so that it can be read and written."""
    state = inner_optimizer(engine).state
    for flat in flat_partitions(engine):
        if "exp_avg" not in state.get(flat, {}):
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            state[flat] = {"step": step, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    if _stage(engine) in (1, 2):
        # DeepSpeed links states to parameters once, after the first group's first step, and misses the later groups.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_steps(engine: Any) -> int:
    """Return how many updates Adam has made, which its bias correction needs.

    torch counts them by tensor, apex's FusedAdam by group.
    """
    inner = inner_optimizer(engine)
    counted = [*inner.state.values(), *inner.param_groups]
    return max((int(state["step"]) for state in counted if "step" in state), default=0)


def _set_optimizer_steps(inner: torch.optim.Optimizer, steps: int) -> None:
    if not isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            group["step"] = steps
    for state in inner.state.values():
        if "step" in state:  # each gets its own tensor: they are advanced in place
            state["step"] = torch.full_like(state["step"], float(steps))


def read_parameter(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Gather this rank's whole tensor-parallel piece of a parameter over dp. It is float32 and must not be changed."""
    if _stage(engine) < 3:
        return parameter.data
    return _gather_partition(stored(parameter), parameter, engine)


def read_moment(engine: Any, parameter: nn.Parameter, moment: str) -> Tensor:
    """Gather this rank's whole tensor-parallel piece of one of Adam's moments. It must not be changed."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    stage = _stage(engine)
    if stage == 0:
        return inner_optimizer(engine).state[parameter][moment]
    if stage < 3:
        return safe_get_full_optimizer_state(parameter, moment).view(parameter.shape)
    return _gather_partition(safe_get_local_optimizer_state(parameter, moment), parameter, engine)


def _gather_partition(local: Tensor, parameter: nn.Parameter, engine: Any) -> Tensor:
    group, shape = engine.mpu.get_data_parallel_group(), gathered_shape(parameter)
    pieces = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, local.contiguous(), group=group)
    return torch.cat(pieces)[: shape.numel()].view(shape)


def _partition(full: Tensor, like: Tensor, engine: Any) -> Tensor:
    """Return ZeRO-3's slice of a flattened, zero-padded tensor."""
    numel, rank = like.numel(), engine.mpu.get_data_parallel_rank()
    flat = torch.zeros(numel * engine.mpu.get_data_parallel_world_size(), dtype=full.dtype, device=full.device)
    flat[: full.numel()] = full.flatten()
    return flat[rank * numel : (rank + 1) * numel]


def write_state(
    engine: Any, pieces: Iterator[tuple[nn.Parameter, Tensor, dict[str, Tensor]]], steps: int
) -> None:
    """Set parameters and moments from whole tensor-parallel pieces, then everything DeepSpeed derives from them.

    Args:
        pieces: (parameter, weights, moments) where frozen parameters have no moments.
        steps: Adam's update count.
    """
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    stage = _stage(engine)
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    ensure_optimizer_state(engine)
    for parameter, weights, moments in pieces:
        device = engine.device
        weights = weights.to(device)
        if stage == 3:
            own = _partition(weights, stored(parameter), engine)
            stored(parameter).copy_(own)
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, own)
        else:
            parameter.data.copy_(weights)
            if stage > 0 and parameter.requires_grad:
                safe_set_full_fp32_param(parameter, weights)
        for moment, value in moments.items():
            value = value.to(device)
            if stage == 0:
                inner_optimizer(engine).state[parameter][moment].copy_(value)
            elif stage == 3:
                safe_set_local_optimizer_state(parameter, _partition(value, stored(parameter), engine), moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
    _set_optimizer_steps(inner_optimizer(engine), steps)
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    if stage == 3:
        for group in range(len(engine.optimizer.fp16_groups)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        engine.optimizer.checkpoint_event_epilogue()
