"""The contrastive scale stays at its ceiling on every ZeRO stage, in the engine's own copies of it as well."""

from __future__ import annotations

import math

import pytest
from distributed import run_ranks
from layouts import Run, differences
from tiny_run import Outcome, reference, tiny_config

from megavtp.config.schema import Config

CEILING = 0.75  # of the logarithm; the run starts at 1
LAYOUTS = [{"zero_stage": zero} for zero in range(4)] + [{"zero_stage": 1, "tp": 2}, {"zero_stage": 2, "pp": 2}]


def config_of(parallel: dict | None = None) -> Config:
    contrastive = {"max_scale": math.exp(CEILING)}
    settings = {"objectives": {"contrastive": contrastive}, "parallel": parallel or {}}
    return tiny_config(settings, 2 if parallel else None)


def on_ranks(rank: int) -> list[tuple[Outcome, float]]:
    """Of each layout the outcome, and the scale that a checkpoint after the steps would hold."""
    found = []
    for layout in LAYOUTS:
        run = Run(config=config_of(layout)).train()
        saved = run.engine.export(lambda number: True).get("model/logit_scale", [math.nan])
        found.append((run.outcome(), float(saved[0])))
        run.engine.close()
    return found


@pytest.mark.timeout(200)
def test_every_layout_holds_it_there():
    expected = reference(config_of())
    assert float(expected.weights["logit_scale"]) <= CEILING
    ranks = run_ranks(2, on_ranks, timeout=180)
    for layout, (outcome, _), saved in zip(LAYOUTS, ranks[0], zip(*([value for _, value in rank] for rank in ranks))):
        assert differences(outcome, expected).exact, layout
        assert saved[1] <= CEILING and not saved[0] > CEILING, layout  # a pipeline's first rank has none
