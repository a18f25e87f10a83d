"""ZeRO-1 reduces gradients while the step's last backward runs, as ZeRO-2 does in every backward.

DeepSpeed reduces them in ``step()``, when nothing is left to compute, for only then have all backwards been. With
``overlap_comm`` it would do so in the last backward, but forget the parameters that this one does not reach: our passes
go through different towers. So these follow in ``step()``.
"""

from typing import Any


def reduce_in_last_backward(engine: Any) -> None:
    """Let a ZeRO-1 engine reduce each gradient, on a stream of its own, as soon as it is complete in a backward which
    DeepSpeed is told is the last (``deepspeed_adapter.before_backward``)."""
    optimizer = engine.optimizer
    optimizer.overlap_comm = True  # two buckets in turn: one is filled while the other is reduced

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        if not engine._running_engine_step:  # the end of the last backward
            return
        in_bucket = {number for bucket in optimizer.ipg_buckets.values() for _, _, number in bucket.params}
        for group, parameters in enumerate(optimizer.bit16_groups):
            for parameter in parameters:
                number = optimizer.get_param_id(parameter)
                reduced = number in in_bucket or optimizer.params_already_reduced[number]
                if not reduced and parameter.grad is not None:
                    optimizer.reduce_ready_partitions_and_remove_grads(parameter, group)
        optimizer.overlapping_partition_gradients_reduce_epilogue()

    optimizer.reduce_gradients = reduce_gradients
