"""Nothing piles up from step to step, and ZeRO-3 lets go of what it has gathered."""

from __future__ import annotations

import gc
import time
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from layouts import Cell, Run

from megavtp.parallel.passes import Pass, execute
from megavtp.training import step

STAGES = (0, 1, 2, 3)


def _settled() -> tuple[int, int]:
    """What is alive once gloo's threads have let go of what they sent, which may take them a moment."""
    counts = []
    for _ in range(5):
        counts.append(_live())
        time.sleep(0.1)
    return min(counts)


def _live() -> tuple[int, int]:
    """(number of tensors, bytes of their storages) that Python can reach."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.is_sparse}
    return len(tensors), sum(storages.values())


def _gathered(run: Run) -> list[str]:
    """Parameters that hold more than their shard."""
    return [n for n, p in run.model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE" or p.numel() > 0]


def on_ranks(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for zero in STAGES:
        run = Run(config=Cell(dp=2, zero=zero).config({"train": {"steps": 6}}))
        _ = [run.data(index) for index in range(6)]  # kept for the life of the process: made before anything is counted
        held: dict[str, list[str]] = {}

        def noting(objective: Pass, *rest: Any, run: Run = run, held: dict = held) -> Any:
            terms = execute(objective, *rest)
            held[objective.name] = _gathered(run)
            return terms

        counts = []
        for first, end in ((0, 2), (2, 6)):
            with mock.patch.object(step, "execute", noting if zero == 3 else execute):
                run.train(first, end)
            run.terms.clear(), run.norms.clear()
            counts.append(_settled())
        found[zero] = counts
        if zero == 3:
            found["held"] = held | {"step": _gathered(run)}
            found["names"] = [name for name, _ in run.model.named_parameters()]
        run.engine.close()
        del run, noting
    return found


@pytest.fixture(scope="module")
def found() -> dict[Any, Any]:
    return run_ranks(2, on_ranks, timeout=240)[0]


@pytest.mark.parametrize("zero", STAGES)
def test_nothing_piles_up(zero: int, found: dict) -> None:
    """Live tensors after two and after six steps: one left behind a step would be four. A step does leave the passes'
    last teacher outputs, whose size varies a little with the masks."""
    two, six = found[zero]
    assert abs(six[0] - two[0]) < 4
    assert abs(six[1] / two[1] - 1) < 0.005


@pytest.mark.parametrize("moment", ["contrastive", "self_distillation", "reconstruction", "step"])
def test_zero3_releases_what_it_gathered(moment: str, found: dict) -> None:
    """After each pass and after the update every parameter is a shard again: also the prototypes, whose module takes
    no tensor, so that no gradient of an input tells ZeRO-3 that its backward is over."""
    assert any(name.startswith("dino_head.last_layer.") for name in found["names"])
    assert found["held"][moment] == []
