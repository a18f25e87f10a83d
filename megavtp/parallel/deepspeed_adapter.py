"""DeepSpeed's engine: how it is configured and made, and what has to be done before a step and before a backward.

Only this file, ``gather_modules``, ``master_weights``, ``reduce_early``, ``reduce_in_place``, ``shard_matrix``,
``stream_order``, ``gradient_norm`` and ``engine_state`` touch DeepSpeed's internals. They are written against exactly
DeepSpeed 0.19.8: ZeRO-3 gathers of earlier releases return garbage on gloo, and several of the faults that are worked
around here are silent. Each work-around states its reason; ``tests/parallel/test_deepspeed_adapter.py`` fails without
it, and also tells when a later DeepSpeed no longer needs it.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from megavtp.arithmetic import ceil_div
from megavtp.config.load import merged
from megavtp.errors import UserError
from megavtp.parallel import gradient_norm
from megavtp.parallel.gather_modules import ModuleGathers, block_chains
from megavtp.parallel.master_weights import share_master_weights
from megavtp.parallel.mesh import Axis, Mesh
from megavtp.parallel.reduce_early import reduce_in_last_backward
from megavtp.parallel.reduce_in_place import reduce_in_place
from megavtp.parallel.shard_matrix import gather_by_columns, reduce_by_columns
from megavtp.parallel.stream_order import order_streams

SUPPORTED_VERSION = "0.19.8"
_BUCKET = 50_000_000  # elements at most
# What a user can ask of DeepSpeed instead of a gather by columns.
_OTHER_GATHERS = ("stage3_allgather_sequential", "stage3_use_all_reduce_for_fetch_params")


def import_deepspeed() -> Any:
    """Import DeepSpeed, make it quiet, and check that it is the supported version.

    Raises:
        UserError: it is missing, or it is another version.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that newer versions of torch warn of, once per call site.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"deepspeed cannot be imported ({error}): pip install deepspeed=={SUPPORTED_VERSION}") from None
    if deepspeed.__version__.split("+")[0] != SUPPORTED_VERSION:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is not supported (other versions return wrong ZeRO-3 gathers or "
            f"gradients): pip install deepspeed=={SUPPORTED_VERSION}"
        )
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # On CPUs it would compile, at every first start, an inference all-reduce that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import_muon()
    return deepspeed


def import_muon() -> None:
    """Import Muon's update, which every ZeRO engine of DeepSpeed does, but leave it uncompiled.

    MegaVTP never calls it, and ``torch.compile`` would load its compiler: two seconds of each rank's start.
    """
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def bucket_elements(parameters: int) -> int:
    """Return the elements of a communication bucket of a rank that trains so many, unless the user gives another
    number. DeepSpeed allocates it whole."""
    return ceil_div(min(parameters, _BUCKET), 1024) * 1024  # a multiple of its alignment


def build_config(
    zero_stage: int, clip_grad: float, parameters: int, dp: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run; ``extra`` (the user's ``deepspeed:`` keys) is merged in last.

    Args:
        parameters: trainable numel of this rank, which caps the communication buckets.
        dp: data-parallel ranks, over which gradients are averaged.
    """
    # Without streams there is nothing to hide the reduction behind.
    overlap = torch.cuda.is_available() and dp > 1
    bucket = bucket_elements(parameters)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # never used: the trainer owns the batch
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # step() is the boundary, however many backwards came before
        # DeepSpeed's default is 1.0, so it is always set. Stage 0 must clip, as ``gradient_norm.own_stage0_norm`` says.
        "gradient_clipping": clip_grad if zero_stage > 0 else 1.0,
        "timers": {"throughput": {"enabled": False}},  # by default each forward waits for the device, to be timed
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": overlap,
            # A rank alone has nothing to send, and would only copy its gradients once more.
            "contiguous_gradients": not (zero_stage == 3 and dp == 1),
            # A parameter that stays gathered would not see the shard-wise teacher update.
            "stage3_param_persistence_threshold": 0,
        },
    }
    config = merged(config, extra)
    if zero_stage == 0:  # there is nothing to overlap, and DeepSpeed refuses to
        config = merged(config, {"zero_optimization": {"overlap_comm": False}})
    return config


def initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], mesh: Mesh,
    leaf_classes: tuple[type[nn.Module], ...] = (), hold: bool = False,
) -> Any:
    """Make one DeepSpeed engine around everything this rank owns, with the guards that hold for the whole run.

    ``hold``: ZeRO-3 gathers all parameters once a step, instead of each block's whenever it runs.
    """
    deepspeed = import_deepspeed()
    zero = ds_config["zero_optimization"]
    stage = zero["stage"]
    early = stage == 1 and zero["overlap_comm"]
    if early:  # DeepSpeed's own way, which it refuses here, forgets what the last backward of a step does not reach
        ds_config = merged(ds_config, {"zero_optimization": {"overlap_comm": False}})
    if stage == 3 and leaf_classes:
        # Gather a transformer block's parameters in one collective instead of one per sub-module.
        deepspeed.utils.set_z3_leaf_modules(module, list(leaf_classes))
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config, mpu=_mpu(mesh))
    except ValidationError as error:  # only the user's values can be wrong, and their names were checked before
        first = error.errors()[0]
        raise UserError("deepspeed: DeepSpeed does not take {loc[0]} = {input!r}: {msg}".format(**first)) from None
    if stage == 3:
        # At every root forward ZeRO-3 compares its trace of module calls over the *world*: pipeline stages would
        # deadlock, and our passes call different towers. Without the hook each module gathers its own on demand.
        engine.optimizer.parameter_offload.fwd_pre_hook.remove()
        reduce_by_columns()
        if not any(zero.get(key) for key in _OTHER_GATHERS):
            gather_by_columns(module.parameters())
        ModuleGathers(engine, [] if hold else block_chains(module))
    if stage == 0:
        reduce_in_place(engine)
    else:
        share_master_weights(engine, mesh.dp_rank)
    if early:
        reduce_in_last_backward(engine)
    if stage > 0 and engine.device.type == "cuda":
        order_streams(engine, stage)
    engine.megavtp_early = early
    engine.megavtp_hold = hold and stage == 3
    gradient_norm.install(engine, mesh)
    return engine


def zero3_linear() -> Callable[..., torch.Tensor]:
    """Return what a ZeRO-3 engine puts in the place of ``torch.nn.functional.linear``, for the whole process."""
    import_deepspeed()
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return zero3_linear_wrap


def _mpu(mesh: Mesh) -> SimpleNamespace:
    """Return the mesh as Megatron's model-parallel unit, which DeepSpeed asks for groups, ranks and sizes.

    The model-parallel group is the tp x pp ranks of one replica, and the model-parallel rank counts over both: the
    gradient norm is summed over that group.
    """
    # DeepSpeed needs a group also for an axis of size 1, and every rank takes part in creating each one.
    alone = [dist.new_group([rank]) for rank in range(mesh.world_size)][mesh.rank]
    axes: list[tuple[str, Axis, int]] = [
        ("data", "dp", mesh.dp_rank), ("model", "mp", mesh.pp_rank * mesh.tp + mesh.tp_rank),
        ("tensor_model", "tp", mesh.tp_rank), ("pipeline_model", "pp", mesh.pp_rank),
    ]
    unit = SimpleNamespace()
    for name, axis, rank in axes:
        answers = {"group": mesh.group(axis) or alone, "rank": rank, "world_size": mesh.size(axis)}
        for question, answer in answers.items():
            setattr(unit, f"get_{name}_parallel_{question}", lambda answer=answer: answer)
    return unit


def before_step(engine: Any) -> None:
    """Prepare the engine for the first backward of an optimizer step.

    ZeRO-3 never clears its partitioned gradient buffer: a parameter whose gradient is missing, or does not arrive in
    the first backward of the step, would get the last step's gradient again.
    """
    gradient_norm.forget(engine)
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
        parameter.ds_active_sub_modules.add(-1)  # no module has this number, so none releases it when it is done


def before_backward(engine: Any, is_last: bool) -> None:
    """Prepare the engine for a backward; this is called immediately before each one. ``is_last``: of the step.

    ``engine.forward`` resets state that all micro-batches in flight share. After two backwards in a row, ZeRO-3's
    second one would overwrite the first one's reduced gradient; and a per-module counter would keep the whole model
    gathered until the backward ends.
    """
    optimizer = engine.optimizer
    # ZeRO-1 may reduce in this backward; None leaves it to ``step()``.
    engine._is_gradient_accumulation_boundary = True if is_last and engine.megavtp_early else None
    if hasattr(optimizer, "clear_backward_seen_flag"):
        optimizer.clear_backward_seen_flag()
    for module in engine.module.modules():
        if hasattr(module, "ds_grads_remaining"):
            module.ds_grads_remaining = 1
