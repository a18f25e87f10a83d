"""Which DeepSpeed keys a user may add under ``deepspeed:``, and which MegaVTP sets itself.

A key is passed on if it changes speed or memory, but not the numbers of a step:
``tests/parallel/test_deepspeed_keys.py`` compares every such key with plain torch. DeepSpeed ignores a top-level key
that it does not know, so the names are checked here, against release 0.19.8.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from megavtp.errors import UserError

_BATCH = "set train.batch_size and objectives.*.micro_batch"
_PRECISION = "set parallel.precision"
_OWN_LOGS = "set the keys of the telemetry section"

OWNED: dict[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": "it is always off: a step ends where MegaVTP says",
    "gradient_clipping": "set train.optimizer.clip_grad",
    "optimizer": "set the keys of train.optimizer",
    "scheduler": "set train.optimizer.lr, min_lr and warmup_steps",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "fp16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": "gradients and moments are always float32",
    "activation_checkpointing": "set parallel.recompute",
    "tensor_parallel": "set parallel.tp",
    "pipeline": "set parallel.pp",
    "checkpoint": "set train.checkpoint_every and train.keep_last",
    "wandb": _OWN_LOGS,
    "tensorboard": _OWN_LOGS,
    "csv_monitor": _OWN_LOGS,
    "comet": _OWN_LOGS,
    "zero_optimization.stage": "set parallel.zero_stage",
    "zero_optimization.stage3_param_persistence_threshold": "it is always 0: the teacher's update needs it",
    "zero_optimization.load_from_fp32_weights": "MegaVTP's own checkpoints are used",
    "zero_optimization.elastic_checkpoint": "MegaVTP's own checkpoints load on any layout",
}

_FLOAT32 = "gradients are always summed in float32"
_LESS_MEMORY = "for less memory set parallel.zero_stage, recompute and the micro-batches"

# These keys do not work with DeepSpeed 0.19.8 here; most of them fail silently.
REFUSED: dict[str, str] = {
    "communication_data_type": _FLOAT32,
    "prescale_gradients": f"{_FLOAT32}, which has the range",
    "gradient_predivide_factor": f"{_FLOAT32}, which has the range",
    "zero_optimization.offload_optimizer": f"the backwards of a step would not add up; {_LESS_MEMORY}",
    "zero_optimization.offload_param": f"checkpoints gather the weights on the devices; {_LESS_MEMORY}",
    "zero_optimization.round_robin_gradients": "checkpoints would have the moments of other parameters",
    "zero_optimization.zero_hpz_partition_size": "no gather would use its second copy of the weights",
    "zero_optimization.stage3_module_granularity_threshold": "DeepSpeed 0.19.8 fails with it",
}

_ZERO = """
    contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm sub_group_size stage3_max_live_parameters stage3_max_reuse_distance
    stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
    memory_efficient_linear log_trace_cache_warnings enable_sanity_checks
"""
PASSED: frozenset[str] = frozenset(
    """
    zero_optimization comms_logger flops_profiler wall_clock_breakdown memory_breakdown dump_state steps_per_print
    """.split()
) | {f"zero_optimization.{name}" for name in _ZERO.split()}


def check(section: Mapping[str, Any], zero_stage: int | str) -> None:
    """Refuse keys of the ``deepspeed`` section that MegaVTP sets itself, that do not work with it or with this ZeRO
    stage, or that DeepSpeed does not have. UserError."""
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UserError(f"deepspeed.zero_optimization: expected a mapping of keys, got {zero!r}")
    for key in [*section, *(f"zero_optimization.{name}" for name in zero)]:
        for table, why in ((OWNED, "is MegaVTP's to set"), (REFUSED, "does not work here")):
            if key in table:
                raise UserError(f"deepspeed.{key}: {why}; remove it: {table[key]}")
        if key not in PASSED:
            near = difflib.get_close_matches(key, [*PASSED, *OWNED, *REFUSED], n=1)
            hint = f"did you mean deepspeed.{near[0]}?" if near else "remove it"
            raise UserError(f"deepspeed.{key}: not a key of DeepSpeed 0.19.8 that MegaVTP passes on; {hint}")
    if zero.get("overlap_comm") and zero_stage == 0:
        raise UserError(
            "deepspeed.zero_optimization.overlap_comm needs parallel.zero_stage 1, 2 or 3, not 0: change one of them"
        )
