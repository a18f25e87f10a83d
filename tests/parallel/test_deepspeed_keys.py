"""Every DeepSpeed key that a user may add leaves the numbers those of plain torch, on the stages that read it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from distributed import run_ranks
from layouts import Run, differences
from tiny_run import reference, tiny_config
from toy import ALTERNATING, ONLY_A, Outcome, plain, run

from megavtp.config.deepspeed_keys import PASSED, REFUSED
from megavtp.config.schema import Config
from megavtp.parallel import gradient_norm
from megavtp.parallel.mesh import build_mesh

EXACT = 2e-6  # float32 rounding, as in ``test_deepspeed_adapter``
STEPS = [ALTERNATING, ONLY_A, ALTERNATING]  # several backwards a step; one head is left out once

# Values other than MegaVTP's or DeepSpeed's own, by the stage that reads them; buckets and groups below a tensor's
# size. Two runs of a stage where one key would switch off what another one changes.
_BUCKETS = {"reduce_bucket_size": 50, "allgather_bucket_size": 50}
ZERO: dict[int, list[dict[str, Any]]] = {
    1: [
        {**_BUCKETS, "allgather_partitions": False, "reduce_scatter": False}, {**_BUCKETS, "overlap_comm": True},
        {"overlap_comm": True, "contiguous_gradients": False},
    ],
    2: [
        {**_BUCKETS, "overlap_comm": True, "contiguous_gradients": False, "use_multi_rank_bucket_allreduce": False},
        {"overlap_comm": True, "allgather_partitions": False, "reduce_scatter": False},
    ],
    3: [
        {
            "reduce_bucket_size": 50, "overlap_comm": True, "contiguous_gradients": False, "sub_group_size": 50,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
            "stage3_allgather_sequential": True, "memory_efficient_linear": False, "log_trace_cache_warnings": True,
            "enable_sanity_checks": True,
        },
        {"overlap_comm": True, "stage3_use_all_reduce_for_fetch_params": True, "reduce_scatter": False},
    ],
}
TOLD = {  # what only prints
    "comms_logger": {"enabled": True}, "flops_profiler": {"enabled": True, "profile_step": 1},
    "wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True, "steps_per_print": 1,
}
# Refused, because of these: stage, value. Where one is exact, a later DeepSpeed has mended it.
SILENT = {"offload_optimizer": (2, {"device": "cpu"}), "round_robin_gradients": (1, True)}


def on_ranks(rank: int) -> dict[Any, Any]:
    mesh, found = build_mesh(1, 1), {}
    for stage, sets in ZERO.items():
        for index, zero in enumerate(sets):
            found[stage, index] = run(mesh, stage, STEPS, extra={"zero_optimization": zero})
    found[0, "all that prints"] = run(mesh, 0, STEPS, extra=TOLD)
    trained = Run(config=whole_run()).train()
    found["VTP"] = trained.outcome()
    trained.engine.close()
    for name, (stage, value) in SILENT.items():  # last: they may leave DeepSpeed in some other state
        extra = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {name: value}}
        with patch.object(gradient_norm, "own_norm_of_partitions", lambda *args: None):  # it has no offloaded gradients
            found[name] = run(mesh, stage, STEPS, extra=extra)
    return found


def whole_run() -> Config:
    """The tiny VTP with many settings at once."""
    deepspeed = {**TOLD, "zero_optimization": {**ZERO[3][0], "reduce_bucket_size": 2000, "sub_group_size": 2000}}
    return tiny_config({"train": {"steps": 2}, "parallel": {"zero_stage": 3}, "deepspeed": deepspeed}, 2)


@pytest.fixture(scope="module")
def found() -> dict[Any, Any]:
    return run_ranks(2, on_ranks, timeout=240)[0]


@pytest.fixture(scope="module")
def expected() -> Outcome:
    return plain(STEPS)


def off(outcome: Outcome, expected: Outcome) -> float:
    """Largest difference of weights, norms and moments, and of what the teacher says."""
    tensors = [float((outcome.tensors[name] - value).abs().max()) for name, value in expected.tensors.items()]
    teacher = [float((a - b).abs().max()) for a, b in zip(outcome.teacher, expected.teacher, strict=True)]
    return max(outcome.difference(expected), *tensors, *teacher)


def test_every_key_that_is_passed_on_is_run() -> None:
    zero = {f"zero_optimization.{name}" for sets in ZERO.values() for values in sets for name in values}
    assert zero | TOLD.keys() | {"zero_optimization"} == PASSED
    assert {f"zero_optimization.{name}" for name in SILENT} <= REFUSED.keys()


@pytest.mark.timeout(300)
def test_the_keys_leave_all_numbers_as_they_are(found: dict, expected: Outcome) -> None:
    for case, outcome in found.items():
        if isinstance(case, tuple):
            assert off(outcome, expected) < EXACT, case


def test_a_whole_run_with_many_at_once(found: dict) -> None:
    assert differences(found["VTP"], reference(tiny_config({"train": {"steps": 2}}))).exact


@pytest.mark.parametrize("name", SILENT)
def test_what_is_refused_would_be_wrong(name: str, found: dict, expected: Outcome) -> None:
    assert off(found[name], expected) > 1e-3, f"{name} could be passed on"
