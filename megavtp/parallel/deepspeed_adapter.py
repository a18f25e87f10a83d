"""Every touch of a DeepSpeed internal, in one place.

Written against exactly DeepSpeed 0.19.8: ZeRO-3 gathers of earlier releases return garbage on gloo, and several of the
faults worked around here are silent. Each work-around states its reason; ``tests/parallel/test_deepspeed_adapter.py``
fails without it, and also tells when a later DeepSpeed no longer needs it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from megavtp.config.load import merged
from megavtp.errors import UserError
from megavtp.parallel.collectives import all_gather_object
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.mpu import Mpu
from megavtp.parallel.sharding import shard_of

SUPPORTED_VERSION = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed() -> Any:
    """DeepSpeed, quiet and of the supported version.

    Raises:
        UserError: it is missing or another version.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that newer torch warns of, once per call site.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"deepspeed cannot be imported ({error}): pip install deepspeed=={SUPPORTED_VERSION}"
        ) from None
    if deepspeed.__version__.split("+")[0] != SUPPORTED_VERSION:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is not supported (other versions return wrong ZeRO-3 gathers or "
            f"gradients): pip install deepspeed=={SUPPORTED_VERSION}"
        )
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # On CPUs it would compile, at every first start, an inference all-reduce that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def build_config(zero_stage: int, clip_grad: float, parameters: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; ``extra`` (the user's ``deepspeed:`` keys) is merged in last.

    Args:
        parameters: trainable numel of this rank; caps the communication buckets, which DeepSpeed allocates whole.
    """
    bucket = -(-min(parameters, 50_000_000) // 1024) * 1024  # a multiple of its alignment
    config = {
        "train_micro_batch_size_per_gpu": 1,  # never used: the trainer owns the batch
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # step() is the boundary, however many backwards came before
        # DeepSpeed's default is 1.0, so it is always said. Stage 0 must call our own clipping: see `_own_stage0_norm`.
        "gradient_clipping": clip_grad if zero_stage > 0 else 1.0,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
            # A parameter that stays gathered would not see the shard-wise teacher update.
            "stage3_param_persistence_threshold": 0,
        },
    }
    return merged(config, extra)


def mark_norm_ownership(module: nn.Module, mesh: Mesh) -> None:
    """Say on each parameter whether this rank counts it in the global gradient norm.

    DeepSpeed counts a parameter where ``model_parallel`` is true (or on model-parallel rank 0): a tensor-parallel
    slice counts on every rank, a replicated parameter on one. Without it the norm is off by 7 to 35 %, silently.
    """
    for parameter in module.parameters():
        parameter.model_parallel = shard_of(parameter) is not None or mesh.tp_rank == 0


def initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], mesh: Mesh,
    leaf_classes: tuple[type[nn.Module], ...] = (), hold: bool = False,
) -> Any:
    """One DeepSpeed engine around everything this rank owns, with the guards that hold for the whole run.

    ``hold``: ZeRO-3 gathers all parameters once a step instead of a block's whenever it runs.
    """
    deepspeed = import_deepspeed()
    stage = ds_config["zero_optimization"]["stage"]
    mark_norm_ownership(module, mesh)
    # Pipeline ranks have different parameter groups: a head is on the last one only.
    towers = {group["tower"] for group in optimizer.param_groups if "tower" in group}
    towers = sorted(set().union(*all_gather_object(towers)))
    if stage == 3 and leaf_classes:
        # Gather a transformer block's parameters in one collective instead of one per sub-module.
        deepspeed.utils.set_z3_leaf_modules(module, list(leaf_classes))
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config, mpu=Mpu(mesh))
    except ValidationError as error:  # of a value of the user's: names are checked before, the other values are ours
        first = error.errors()[0]
        raise UserError("deepspeed: DeepSpeed does not take {loc[0]} = {input!r}: {msg}".format(**first)) from None
    if stage == 3:
        # At every root forward ZeRO-3 compares its trace of module calls over the *world*: pipeline stages would
        # deadlock, and our passes call different towers. Without the hook each module gathers its own on demand.
        engine.optimizer.parameter_offload.fwd_pre_hook.remove()
    engine.megavtp_hold = hold and stage == 3
    engine.megavtp_towers, engine.megavtp_tower_norms = towers, []
    if stage == 0:
        _own_stage0_norm(engine, mesh)
    else:
        _norm_by_tower(engine, mesh)
    return engine


def _own_stage0_norm(engine: Any, mesh: Mesh) -> None:
    """Stage 0 neither reports the gradient norm nor skips a non-finite step: do both where it would clip."""
    inner_step = engine.optimizer.step
    engine.optimizer.overflow = False

    def clip(max_norm: float) -> None:
        groups = [[p for p in group["params"] if p.grad is not None] for group in engine.optimizer.param_groups]
        norms = []
        for group in groups:
            owned = [p.grad for p in group if p.model_parallel]
            zero = torch.zeros((), device=engine.device)
            norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(owned))) if owned else zero)
        norm = _total_norm(engine, mesh, norms, range(len(groups)))
        gradients = [p.grad for group in groups for p in group]
        engine.optimizer._global_grad_norm = norm
        engine.optimizer.overflow = not bool(torch.isfinite(norm))  # one host read, as in the other stages
        if max_norm > 0 and not engine.optimizer.overflow:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))

    def step(*args, **kwargs):
        if not engine.optimizer.overflow:
            inner_step(*args, **kwargs)

    engine.optimizer.step = step
    engine.clip_fp32_gradients = lambda: clip(engine.megavtp_clip_grad)


def _norm_by_tower(engine: Any, mesh: Mesh) -> None:
    """Sum the squares of stages 1 to 3 over the model-parallel ranks by tower, in one call.

    DeepSpeed does it group by group, but pipeline ranks have different parameter groups: one's sum would meet another
    group's, or nobody's. And it drops the parts on the way to the total.
    """
    optimizer, found = engine.optimizer, []

    of_group_alone = optimizer.get_grad_norm_direct

    def noted(*args, **kwargs):
        found.append(of_group_alone(*args, **kwargs))
        return found[-1]

    optimizer.get_grad_norm_direct = noted
    stage3 = hasattr(optimizer, "_get_norm_groups")
    name = "_get_norm_groups" if stage3 else "scaled_global_norm"
    over_groups = getattr(optimizer, name)

    def total(*args, **kwargs):
        found.clear()
        over_ranks = optimizer._model_parallel_all_reduce
        optimizer._model_parallel_all_reduce = lambda tensor, op: None
        try:
            over_groups(*args, **kwargs)
        finally:
            optimizer._model_parallel_all_reduce = over_ranks
        of_group = getattr(optimizer, "sub_group_to_group_id", None) or range(len(found))  # stage 3 splits groups
        norm = _total_norm(engine, mesh, found, of_group)
        return [norm] if stage3 else norm

    setattr(optimizer, name, total)


def _total_norm(engine: Any, mesh: Mesh, norms: list[Any], of_group: Mapping[int, int] | range) -> Tensor:
    """The norm over all model-parallel ranks of this rank's group norms, infinite if it is not finite; the towers'
    are kept. ``of_group``: norm -> parameter group."""
    groups, towers = engine.optimizer.param_groups, engine.megavtp_towers
    squares = torch.zeros(len(towers) + 1, dtype=torch.float32, device=engine.device)  # the last: of no tower
    for index, norm in enumerate(norms):
        tower = groups[of_group[index]].get("tower")
        norm = torch.as_tensor(norm, dtype=torch.float32, device=engine.device)
        norm = torch.where(norm < 0, torch.nan, norm)  # DeepSpeed writes -1 for what is not finite
        squares[len(towers) if tower is None else towers.index(tower)] += norm.square()
    if mesh.mp_group is not None:
        dist.all_reduce(squares, group=mesh.mp_group)
    engine.megavtp_tower_norms = list(squares[:-1].sqrt().unbind())
    norm = squares.sum().sqrt()
    return torch.where(norm.isfinite(), norm, torch.inf)


def before_step(engine: Any) -> None:
    """Once per optimizer step, before its first backward.

    ZeRO-3 never clears its partitioned gradient buffer: a parameter whose gradient is missing, or does not arrive in
    the first backward of the step, would get the last step's gradient again.
    """
    engine.megavtp_tower_norms = []
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()
    if engine.megavtp_hold:
        _gather_all(engine)


def _gather_all(engine: Any) -> None:
    """Gather every parameter in one collective, and keep it until ``engine.step()``, which lets go of all."""
    parameters = list(engine.module.parameters())
    absent = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
    if absent:
        absent[0].all_gather_coalesced(absent).wait()
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(-1)  # a user that no module is: a module that is done does not release it


def before_backward(engine: Any) -> None:
    """Immediately before every backward.

    ``engine.forward`` resets state that all micro-batches in flight share. After two backwards in a row, ZeRO-3's
    second one would overwrite the first one's reduced gradient; and a per-module counter would keep the whole model
    gathered until the backward ends.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "clear_backward_seen_flag"):
        optimizer.clear_backward_seen_flag()
    for module in engine.module.modules():
        if hasattr(module, "ds_grads_remaining"):
            module.ds_grads_remaining = 1


def step_was_skipped(engine: Any) -> bool:
    """Whether the last ``engine.step()`` left the weights alone because the gradient norm was not finite."""
    return bool(getattr(engine.optimizer, "overflow", False))


def grad_norm(engine: Any) -> Tensor | float:
    """Global gradient norm of the last step, before clipping."""
    return engine.optimizer._global_grad_norm


def tower_norms(engine: Any) -> dict[str, Tensor]:
    """Gradient norm of the parameter groups of each ``tower`` in the last step, before clipping, over all ranks; NaN
    where it was not finite, or where the step was given up before."""
    nothing = torch.full((), torch.nan, device=engine.device)
    return dict(zip(engine.megavtp_towers, engine.megavtp_tower_norms or [nothing] * len(engine.megavtp_towers)))


def shards(parameters: list[nn.Parameter]) -> list[Tensor]:
    """What this rank stores of each parameter: its ZeRO-3 partition, or all of it."""
    return [p.ds_tensor.data if hasattr(p, "ds_tensor") else p.data for p in parameters]


# ---------------------------------------------------------------------------------------------------------------------
# Whole tensors out of and into the engine, whatever the ZeRO stage. All are collective over the data-parallel group.


def _inner(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _flat_partitions(engine: Any) -> list[Tensor]:
    stage = _stage(engine)
    if stage == 0:
        return [p for p in engine.module.parameters() if p.requires_grad]
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def ensure_optimizer_state(engine: Any) -> None:
    """Create Adam's state where no step has made it yet, so that it can be read and written."""
    state = _inner(engine).state
    for flat in _flat_partitions(engine):
        if "exp_avg" not in state.get(flat, {}):
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            state[flat] = {"step": step, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    if _stage(engine) in (1, 2):
        # DeepSpeed links states to parameters once, after the first group's first step: later groups are missed.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_steps(engine: Any) -> int:
    """How many updates Adam has made (its bias correction). torch counts by tensor, apex's FusedAdam by group."""
    inner = _inner(engine)
    places = [*inner.state.values(), *inner.param_groups]
    return max((int(place["step"]) for place in places if "step" in place), default=0)


def _set_optimizer_steps(inner: torch.optim.Optimizer, steps: int) -> None:
    if not isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            group["step"] = steps
    for state in inner.state.values():
        if "step" in state:  # each gets its own tensor: they are advanced in place
            state["step"] = torch.full_like(state["step"], float(steps))


def read_parameter(engine: Any, parameter: nn.Parameter) -> Tensor:
    """This rank's whole tensor-parallel piece of a parameter, gathered over dp; float32, not to be changed."""
    if _stage(engine) < 3:
        return parameter.data
    return _gather_partition(parameter.ds_tensor.data, parameter, engine)


def read_moment(engine: Any, parameter: nn.Parameter, moment: str) -> Tensor:
    """This rank's whole tensor-parallel piece of Adam's ``exp_avg`` or ``exp_avg_sq``; not to be changed."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    stage = _stage(engine)
    if stage == 0:
        return _inner(engine).state[parameter][moment]
    if stage < 3:
        return safe_get_full_optimizer_state(parameter, moment).view(parameter.shape)
    return _gather_partition(safe_get_local_optimizer_state(parameter, moment), parameter, engine)


def _gather_partition(local: Tensor, parameter: nn.Parameter, engine: Any) -> Tensor:
    group = engine.mpu.get_data_parallel_group()
    pieces = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, local.contiguous(), group=group)
    return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)


def _partition(full: Tensor, like: Tensor, engine: Any) -> Tensor:
    """ZeRO-3's slice of a flattened, zero-padded tensor."""
    numel, rank = like.numel(), engine.mpu.get_data_parallel_rank()
    flat = torch.zeros(numel * engine.mpu.get_data_parallel_world_size(), dtype=full.dtype, device=full.device)
    flat[: full.numel()] = full.flatten()
    return flat[rank * numel : (rank + 1) * numel]


def write_state(
    engine: Any, pieces: Iterator[tuple[nn.Parameter, Tensor, dict[str, Tensor]]], steps: int
) -> None:
    """Set parameters and moments from whole tensor-parallel pieces, then everything DeepSpeed derives from them.

    Args:
        pieces: (parameter, weights, moments) with moments empty for frozen parameters.
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
            own = _partition(weights, parameter.ds_tensor, engine)
            parameter.ds_tensor.data.copy_(own)
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, own)
        else:
            parameter.data.copy_(weights)
            if stage > 0 and parameter.requires_grad:
                safe_set_full_fp32_param(parameter, weights)
        for moment, value in moments.items():
            value = value.to(device)
            if stage == 0:
                _inner(engine).state[parameter][moment].copy_(value)
            elif stage == 3:
                safe_set_local_optimizer_state(parameter, _partition(value, parameter.ds_tensor, engine), moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
    _set_optimizer_steps(_inner(engine), steps)
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    if stage == 3:
        for group in range(len(engine.optimizer.fp16_groups)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        engine.optimizer.checkpoint_event_epilogue()
