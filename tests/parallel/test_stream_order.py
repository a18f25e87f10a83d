"""Where DeepSpeed makes the host wait for a GPU, streams wait for each other; here with streams that note it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megavtp.parallel.deepspeed_adapter import build_config, import_deepspeed
from megavtp.parallel.stream_order import order_streams


class Stream:
    def __init__(self, told: list[str], name: str) -> None:
        self.told, self.name = told, name

    def synchronize(self) -> None:
        self.told.append(f"the host waits for {self.name}")

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


class Accelerator:
    def __init__(self, told: list[str]) -> None:
        self.told, self.stream = told, Stream(told, "computing")

    def synchronize(self) -> None:
        self.told.append("the host waits for all")

    def current_stream(self) -> Stream:
        return self.stream


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def accelerator(told: list[str]) -> Any:
    import_deepspeed()
    accelerator = Accelerator(told)
    with patch("deepspeed.accelerator.get_accelerator", lambda: accelerator):
        yield accelerator


@pytest.mark.parametrize("stage", [1, 2])
def test_the_end_of_a_backward(stage: int, accelerator: Accelerator, told: list[str]) -> None:
    def reduce(bucket: str, *, rank: int) -> None:
        accelerator.synchronize()
        told.append(f"{bucket} is reduced for {rank}")

    def epilogue() -> None:
        optimizer.allreduce_and_copy("the last bucket", rank=1)
        accelerator.synchronize()
        told.append("freed")

    optimizer = SimpleNamespace(
        independent_gradient_partition_epilogue=epilogue, allreduce_and_copy=reduce,
        reduction_stream=Stream(told, "reduction"),
    )
    order_streams(SimpleNamespace(optimizer=optimizer), stage)
    optimizer.independent_gradient_partition_epilogue()
    # The bucket is made before it is read, and read before it is freed.
    ordered = ["reduction waits for computing", "computing waits for reduction"]
    assert told == [*ordered, "the last bucket is reduced for 1", *ordered, "freed"]
    accelerator.synchronize()  # elsewhere it does what it is for
    assert told.pop() == "the host waits for all"


def test_zero_3(accelerator: Accelerator, told: list[str]) -> None:
    optimizer = SimpleNamespace(reduce_and_partition_stream=Stream(told, "reduction"))
    order_streams(SimpleNamespace(optimizer=optimizer), 3)
    optimizer.reduce_and_partition_stream.synchronize()
    assert told == ["reduction waits for computing", "computing waits for reduction"]


def test_what_is_replaced_is_there() -> None:
    """DeepSpeed has these names, and its streams take another method."""
    import_deepspeed()
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "reduce_and_partition_stream" in DeepSpeedZeroOptimizer_Stage3.__init__.__code__.co_names
    for name in ("independent_gradient_partition_epilogue", "allreduce_and_copy"):
        assert "synchronize" in getattr(DeepSpeedZeroOptimizer, name).__code__.co_names
    assert torch.cuda.Stream.__dictoffset__, "a stream has no attributes of its own"


def test_no_forward_is_timed() -> None:
    from deepspeed.utils.config import get_timers_config

    assert get_timers_config({}).enabled and not get_timers_config(build_config(1, 1.0, 10, 2, {})).enabled
