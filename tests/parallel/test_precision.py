"""bfloat16 compute in every ZeRO stage: near the single-process autocast run, float32 in all that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from layouts import Run, differences
from tiny_run import Outcome, merged, reference, tiny_config

from megavtp.parallel.engine_state import inner_optimizer

BF16 = {"parallel": {"precision": "bf16"}, "train": {"steps": 2}}
STAGES = (0, 1, 2, 3)


def on_ranks(rank: int) -> dict[Any, Any]:
    found = {}
    for zero in STAGES:
        for recompute in ("none", "full"):
            config = tiny_config(merged(BF16, {"parallel": {"zero_stage": zero, "recompute": recompute}}), 2)
            run = Run(config=config).train()
            stored = [getattr(p, "ds_tensor", p).dtype for p in run.model.parameters()]
            moments = [x.dtype for s in inner_optimizer(run.engine._engine).state.values() for x in s.values()]
            found[zero, recompute] = run.outcome(), {*stored, *moments}
            run.engine.close()
    return found


@pytest.fixture(scope="module")
def found() -> dict[Any, Any]:
    return run_ranks(2, on_ranks, timeout=240)[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, Outcome]:
    return {"bf16": reference(tiny_config(BF16)), "fp32": reference(tiny_config())}


@pytest.mark.parametrize("zero", STAGES)
def test_near_the_single_process(zero: int, found: dict, expected: dict) -> None:
    """The same forward, so the first step's terms agree to float32 rounding. A gradient is summed over the samples in
    bfloat16 on each rank, which is another rounding than of one sum; it stays within a few roundings of 2^-8."""
    outcome, _ = found[zero, "none"]
    alone = expected["bf16"]
    assert outcome.terms[0] == pytest.approx(alone.terms[0], rel=1e-5)
    for step, values in enumerate(alone.terms):
        assert outcome.terms[step] == pytest.approx(values, rel=2**-7)
        assert outcome.norms[step]["all"] == pytest.approx(alone.norms[step]["all"], rel=2**-5)
    for name, value in alone.weights.items():
        assert (outcome.weights[name] - value).norm() <= 0.1 * value.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("zero", STAGES[1:])
def test_stages_agree(zero: int, found: dict) -> None:
    """Same processes, same sums: only where the gradient is kept differs, and it is kept in float32."""
    assert differences(found[zero, "none"][0], found[0, "none"][0]).exact


@pytest.mark.parametrize("zero", STAGES)
def test_recompute_changes_nothing(zero: int, found: dict) -> None:
    """Made again in the same precision, activations are the same to the bit."""
    (kept, _), (remade, _) = found[zero, "none"], found[zero, "full"]
    assert remade.terms == kept.terms and remade.norms == kept.norms
    assert all(torch.equal(remade.weights[name], value) for name, value in kept.weights.items())


@pytest.mark.parametrize("zero", STAGES)
def test_what_is_kept_is_float32(zero: int, found: dict, expected: dict) -> None:
    """Weights, teacher and moments; while the compute is in bfloat16: terms are off the float32 run's."""
    outcome, stored = found[zero, "none"]
    assert stored == {torch.float32}
    assert {value.dtype for value in outcome.weights.values()} == {torch.float32}
    first, exact = outcome.terms[0], expected["fp32"].terms[0]
    assert max(abs(first[name] / exact[name] - 1) for name in exact) > 1e-4
    assert first == pytest.approx(exact, rel=2**-6)
