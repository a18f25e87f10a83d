"""Collectives begin once their operands exist, and are waited for where the result is needed: the order of events.

The gathers of ZeRO-3 have a file of their own, ``test_gather_modules``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from layouts import Cell, Run, differences
from tiny_run import reference

from megavtp.models.vision_encoder import VisionEncoder
from megavtp.objectives.centering import sinkhorn_bias, sinkhorn_biases
from megavtp.parallel import collectives
from megavtp.parallel.deepspeed_adapter import build_config
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import build_mesh
from megavtp.parallel.passes import execute
from megavtp.parallel.traffic import count_traffic

CELL = Cell(dp=2)
SETS, ITERATIONS = 2, 3
ONE_STEP, BUCKET = {"train": {"steps": 1}}, 4000


def _noting(name: str, collective: Callable[..., Any], events: list[str]) -> Callable[..., Any]:
    """A collective that says when it begins without being waited for, and when it is waited for."""

    def call(*args: Any, async_op: bool = False, **options: Any) -> Any:
        work = collective(*args, async_op=async_op, **options)
        if not async_op:
            return work
        events.append(f"{name} begun")

        def wait() -> None:
            work.wait()
            events.append(f"{name} awaited")

        return SimpleNamespace(wait=wait)

    return call


@contextmanager
def recorded(*trunks: VisionEncoder) -> Iterator[list[str]]:
    """The collectives that are not waited for at once, and when the blocks of a trunk run."""
    events: list[str] = []

    def before(_: Any, inputs: tuple) -> None:
        events.append("trunk")
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: events.append("backward done"))

    def after(_: Any, inputs: tuple, output: torch.Tensor) -> None:
        events.append("trunk done")
        if output.requires_grad:
            output.register_hook(lambda gradient: events.append("backward"))

    hooks = []
    for trunk in trunks:
        blocks = list(trunk.blocks.values())
        hooks += [blocks[0].register_forward_pre_hook(before), blocks[-1].register_forward_hook(after)]
    with (
        patch.object(collectives, "_all_gather", _noting("gather", collectives._all_gather, events)),
        patch.object(collectives, "_reduce_scatter", _noting("scatter", collectives._reduce_scatter, events)),
        patch.object(dist, "all_reduce", _noting("sum", dist.all_reduce, events)),
    ):
        yield events
    for hook in hooks:
        hook.remove()


def _of_pass(name: str) -> list[str]:
    """The events of a pass with one micro-batch, without those of the engine."""
    run = Run(config=CELL.config({"objectives": {"self_distillation": {"centering": "softmax", "koleo_weight": 0.0}}}))
    objective = next(objective for objective in run.passes if objective.name == name)
    run.engine.begin_step()
    with recorded(run.model.trunk) as events:
        execute(objective, run.engine, run.data(0))
    run.engine.close()
    return events


def _sinkhorn() -> tuple[list[str], bool]:
    """The events of two sets of rows, and whether each has the bias that it has alone."""
    mesh, options = build_mesh(1, 1), {"temperature": 0.1, "iterations": ITERATIONS}
    generator = torch.Generator().manual_seed(dist.get_rank())
    sets = [[torch.randn(rows, 4, generator=generator)] for rows in (5, 9)]
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    with recorded() as events:
        biases = sinkhorn_biases(sets, W, mesh=mesh, **options)
    alone = [sinkhorn_bias(rows, W, mesh=mesh, **options) for rows in sets]
    return events, all(map(torch.equal, biases, alone))


def _zero(stage: int, overlap: bool) -> dict[str, Any]:
    """A run under ZeRO 1 or 2: its outcome, the bytes summed over dp before ``step()`` and in all, and those of the
    gradients that the last backward of a step completes."""
    settings = {"zero_optimization": {"overlap_comm": overlap, "reduce_bucket_size": BUCKET}}
    run = Run(config=replace(CELL, zero=stage).config({**ONE_STEP, "deepspeed": settings}))
    before, step = [], Engine.step

    def noted(engine: Engine) -> Any:
        before.append(traffic.select("dp", "all_reduce").bytes)
        return step(engine)

    with count_traffic(run.mesh) as traffic, patch.object(Engine, "step", noted):
        run.train()
    last = 4 * sum(p.numel() for tower in (run.model.trunk, run.model.pixel_decoder) for p in tower.parameters())
    found = {"outcome": run.outcome(), "before": before[0], "total": dict(traffic.sent), "last": last}
    run.engine.close()
    return found


def on_ranks(rank: int) -> dict[str, Any]:
    passes = {name: _of_pass(name) for name in ("contrastive", "self_distillation")}
    zero = {"zero 1": {overlap: _zero(1, overlap) for overlap in (False, True)}, "zero 2": _zero(2, True)}
    return {**passes, "sinkhorn": _sinkhorn(), **zero}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks(2, on_ranks, timeout=240)[0]


def test_texts_are_gathered_while_images_are_encoded(found: dict) -> None:
    """In the backward, the gradients of the texts are summed meanwhile. Images travel beside the texts' products."""
    assert found["contrastive"] == [
        "gather begun", "trunk", "trunk done", "gather begun", "gather awaited", "gather awaited",
        "scatter begun", "scatter begun", "scatter awaited", "backward", "backward done", "scatter awaited",
    ]


def test_centres_are_summed_while_the_student_computes(found: dict) -> None:
    assert found["self_distillation"][:6] == [
        "sum begun", "sum begun", "trunk", "trunk done", "sum awaited", "sum awaited"
    ]


def test_sinkhorns_sums_travel_while_the_other_set_computes(found: dict) -> None:
    events, same = found["sinkhorn"]
    rounds = SETS * (2 + ITERATIONS - 1) - SETS  # two sums in the first iteration, one in each other
    begun, awaited = ["sum begun"], ["sum awaited"]
    assert events == SETS * begun + rounds * (awaited + begun) + SETS * awaited
    assert same


def test_zero_1_reduces_in_the_last_backward(found: dict) -> None:
    """All but what waits in the bucket, and the towers that the last pass does not reach; nothing more is sent."""
    plain, early = found["zero 1"][False], found["zero 1"][True]
    assert early["last"] - 4 * BUCKET < early["before"] - plain["before"] <= early["last"]
    assert early["total"] == plain["total"]
    assert differences(early["outcome"], reference(CELL.plain_config(ONE_STEP))).exact


def test_zero_2_reduces_in_every_backward(found: dict) -> None:
    """Before the step the last pass's gradients have been sent, and those of the passes before it."""
    two, plain = found["zero 2"], found["zero 1"][False]
    assert two["before"] - plain["before"] > two["last"]
    assert differences(two["outcome"], reference(CELL.plain_config(ONE_STEP))).exact


@pytest.mark.parametrize("gpu, dp, overlaps", [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_gpus_overlap_by_default(monkeypatch: pytest.MonkeyPatch, gpu: bool, dp: int, overlaps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert build_config(1, 0.0, 10, dp, {})["zero_optimization"]["overlap_comm"] == overlaps
    assert not build_config(0, 0.0, 10, dp, {})["zero_optimization"]["overlap_comm"]
