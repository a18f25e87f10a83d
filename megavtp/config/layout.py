"""The rules of a layout that every kind of run has. Each error names the keys in question and the remedy."""

from collections.abc import Mapping
from typing import Any

from megavtp.config.ranges import divides, need
from megavtp.config.run import ParallelConfig
from megavtp.config.share import PassShare


def check_pipeline(p: ParallelConfig, depth: int, depth_key: str, tower: str) -> None:
    """Check schedule, virtual stages, pipeline size and ZeRO-3's gathers. ``tower`` has ``depth`` blocks, and needs one
    on every stage."""
    need(
        p.zero3_gather == "block" or p.zero_stage == 3,
        f"parallel.zero3_gather = {p.zero3_gather}, but parallel.zero_stage = {p.zero_stage} gathers nothing: set "
        "parallel.zero_stage=3 or remove parallel.zero3_gather",
    )
    need(
        p.pp > 1 or p.schedule == "1f1b",
        f"parallel.schedule = {p.schedule}, but parallel.pp = 1 has no pipeline: remove parallel.schedule or raise pp",
    )
    need(
        p.virtual_stages == 1 or p.schedule == "interleaved_1f1b",
        f"parallel.virtual_stages = {p.virtual_stages}, but parallel.schedule = {p.schedule} has one stage a rank: "
        "set parallel.schedule=interleaved_1f1b with parallel.pp above 1, or parallel.virtual_stages=1",
    )
    need(
        p.virtual_stages > 1 or p.schedule != "interleaved_1f1b",
        "parallel.schedule = interleaved_1f1b needs parallel.virtual_stages of 2 or more: raise it, or set "
        "parallel.schedule=1f1b",
    )
    need(
        p.pp * p.virtual_stages <= depth,
        f"parallel.pp x parallel.virtual_stages = {p.pp * p.virtual_stages} stages, but {depth_key} = {depth}: "
        f"every stage needs a block of the {tower}; lower one of the two",
    )


def check_rotary(tower: Any, prefix: str) -> None:
    """Check that the heads of a ``tower``, the section ``prefix``, take rotary positions on two axes."""
    head = tower.width // tower.heads
    need(
        head % 4 == 0,
        f"{prefix}.width = {tower.width} over {prefix}.heads = {tower.heads} gives heads of {head} channels: the "
        "rotary position embedding needs a multiple of 4",
    )


def check_tensor_parallel(p: ParallelConfig, sizes: Mapping[str, int]) -> None:
    """Check that tp divides ``sizes``, which are named for the message, and sequence parallelism."""
    for key, size in sizes.items():
        divides(p.tp, size, "parallel.tp", key, "use a tp that divides it")
    need(
        p.tp > 1 or not p.sequence_parallel,
        "parallel.sequence_parallel = true shares the tokens over tensor-parallel ranks, but parallel.tp = 1: raise "
        "parallel.tp, or set parallel.sequence_parallel=false",
    )


def check_streams(streams: int, batch: int, key: str) -> None:
    """Check that every batch, ``key``, is an equal slice of every logical stream, whatever the layout."""
    remedy = "every batch is an equal slice of every stream; change one of them"
    divides(streams, batch, "data.streams", key, remedy)


def check_micro_batch(part: PassShare, prefix: str, batch: str, dp: int) -> None:
    """Check that micro-batches divide a rank's share of ``batch``, which is named for the message."""
    divides(
        part.micro_batch, part.local, f"{prefix}.micro_batch", f"a rank's share of {batch}",
        f"the share is {part.batch} / {dp} data-parallel ranks; use a micro-batch that divides it",
    )


def data_parallel_size(config: Any, world_size: int) -> int:
    """Return the data-parallel size of ``world_size`` processes. UserError if it does not divide the streams."""
    p = config.parallel
    divides(p.tp * p.pp, world_size, "parallel.tp x parallel.pp", "the number of processes", "change the launch or tp")
    dp = world_size // (p.tp * p.pp)
    divides(
        dp, config.data.streams, "the data-parallel size (processes / parallel.tp / parallel.pp)", "data.streams",
        "set data.streams to a multiple of every data-parallel size you mean to use",
    )
    return dp
