"""On a GPU, DeepSpeed makes the host wait for the device where an order between its streams is enough.

A host that waits launches nothing, so the device is idle afterwards. With pipeline ranks it can wait for ever: the
device is waiting for a message, and the message for what this rank has not launched yet.
"""

from collections.abc import Callable
from typing import Any

_UNLIMITED = 2**31


def order_streams(engine: Any, stage: int) -> None:
    """Let the streams of a ZeRO engine wait for each other, instead of the host for the device."""
    optimizer = engine.optimizer
    if stage in (1, 2):
        # At the end of a backward, before what has been reduced is freed.
        optimizer.independent_gradient_partition_epilogue = _without_host_waits(
            optimizer.independent_gradient_partition_epilogue, optimizer.reduction_stream
        )
    if stage == 3:
        stream = optimizer.reduce_and_partition_stream
        stream.synchronize = lambda: _wait_for(stream)  # the same
        # Before a module, for what was gathered more than two parameters ago, to bound what DeepSpeed gathers ahead on
        # a stream of its own. Ours is gathered on the stream that computes, one block ahead.
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__max_ongoing_fetch_events = _UNLIMITED


def _wait_for(stream: Any) -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().current_stream().wait_stream(stream)


def _without_host_waits(function: Callable[[], None], stream: Any) -> Callable[[], None]:
    """Return ``function`` with the accelerator's ``synchronize`` replaced by a wait of the current stream."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()

    def run() -> None:
        accelerator.synchronize = lambda *_: _wait_for(stream)
        try:
            function()
        finally:
            del accelerator.synchronize

    return run
