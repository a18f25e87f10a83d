"""On a GPU, DeepSpeed makes the host wait for the device where an order between its streams is enough.

A host that waits launches nothing, so the device is idle afterwards. With pipeline ranks it can wait for ever: the
device is waiting for a message, and the message for what this rank has not launched yet.
"""

from collections.abc import Callable
from typing import Any


def order_streams(engine: Any, stage: int) -> None:
    """Let the streams of a ZeRO engine wait for each other, instead of the host for the device."""
    optimizer = engine.optimizer
    if stage in (1, 2):
        # At the end of a backward, before what has been reduced is freed; and, by some of the user's settings, before
        # a bucket is reduced.
        for name in ("independent_gradient_partition_epilogue", "allreduce_and_copy"):
            setattr(optimizer, name, _without_host_waits(getattr(optimizer, name), optimizer.reduction_stream))
    if stage == 3:
        stream = optimizer.reduce_and_partition_stream
        stream.synchronize = lambda: _order(stream)  # at the end of a backward


def _order(stream: Any) -> None:
    """Let ``stream`` and the current one wait for each other: what follows on either comes after what is on both."""
    from deepspeed.accelerator import get_accelerator

    current = get_accelerator().current_stream()
    stream.wait_stream(current)
    current.wait_stream(stream)


def _without_host_waits(function: Callable[..., None], stream: Any) -> Callable[..., None]:
    """Return ``function`` with the accelerator's ``synchronize`` replaced by an order of the streams."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()

    def run(*arguments: Any, **keywords: Any) -> None:
        waits = accelerator.synchronize  # another one of these functions may have replaced it
        accelerator.synchronize = lambda *_: _order(stream)
        try:
            function(*arguments, **keywords)
        finally:
            accelerator.synchronize = waits

    return run
