"""The rules of a layout that every kind of run has. Each error names the keys in question and the remedy."""

from __future__ import annotations

from typing import Any

from megavtp.config.ranges import divides, need
from megavtp.config.run import ParallelConfig


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


def check_sequence_parallel(p: ParallelConfig) -> None:
    need(
        p.tp > 1 or not p.sequence_parallel,
        "parallel.sequence_parallel = true shares the tokens over tensor-parallel ranks, but parallel.tp = 1: raise "
        "parallel.tp, or set parallel.sequence_parallel=false",
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
