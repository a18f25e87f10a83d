"""The weights and Adam's moments as whole tensors, out of DeepSpeed's engine and into it, on any ZeRO stage.

All functions that take the engine are collective over the data-parallel group. See ``deepspeed_adapter`` for the
version of DeepSpeed and the tests.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megavtp.parallel.collectives import gather_pieces

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


def kinds(parameter: nn.Parameter) -> tuple[str, ...]:
    """Return what a run's state has of a parameter: "model" (its value) and, if it trains, Adam's moments."""
    return ("model", *MOMENTS) if parameter.requires_grad else ("model",)


def read(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    """Gather this rank's whole tensor-parallel piece of a parameter or moment over dp. It must not be changed."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    stage = _stage(engine)
    if stage == 3:
        own = stored(parameter) if kind == "model" else safe_get_local_optimizer_state(parameter, kind)
        pieces, shape = gather_pieces(own, engine.mpu.get_data_parallel_group()), gathered_shape(parameter)
        return torch.cat(pieces)[: shape.numel()].view(shape)
    if kind == "model":
        return parameter.data
    if stage == 0:
        return inner_optimizer(engine).state[parameter][kind]
    return safe_get_full_optimizer_state(parameter, kind).view(parameter.shape)


def _partition(full: Tensor, like: Tensor, engine: Any) -> Tensor:
    """Return ZeRO-3's slice of a flattened, zero-padded tensor."""
    numel, rank = like.numel(), engine.mpu.get_data_parallel_rank()
    flat = torch.zeros(numel * engine.mpu.get_data_parallel_world_size(), dtype=full.dtype, device=full.device)
    flat[: full.numel()] = full.flatten()
    return flat[rank * numel : (rank + 1) * numel]


def write_state(engine: Any, pieces: Iterable[tuple[nn.Parameter, str, Tensor]], steps: int) -> None:
    """Set parameters and moments from whole tensor-parallel pieces.

    Args:
        pieces: (parameter, kind, value), all ``kinds`` of each parameter.
        steps: Adam's update count.
    """
    stage = _stage(engine)
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    ensure_optimizer_state(engine)
    for parameter, kind, value in pieces:
        _write(engine, parameter, kind, value.to(engine.device))
    inner = inner_optimizer(engine)
    if not isinstance(inner, torch.optim.AdamW):
        for settings in inner.param_groups:
            settings["step"] = steps
    for state in inner.state.values():
        if "step" in state:  # each gets its own tensor: they are advanced in place
            state["step"] = torch.full_like(state["step"], float(steps))
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def _write(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    from deepspeed import utils

    stage = _stage(engine)
    if stage == 3:
        value = _partition(value, stored(parameter), engine)
    if kind == "model":
        stored(parameter).copy_(value)  # the optimizer's weights are these
    elif stage == 0:
        inner_optimizer(engine).state[parameter][kind].copy_(value)
    elif stage == 3:
        utils.safe_set_local_optimizer_state(parameter, value, kind)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, kind)
