"""The search over layouts and the tool around it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import yaml
from planned_runs import layout

from megavtp.config.load import from_dict, merged, to_dict
from megavtp.config.run import ParallelConfig
from megavtp.config.schema import Config
from megavtp.config.validate import validate
from megavtp.errors import UserError
from megavtp.planning import report
from megavtp.planning.devices import find_device
from megavtp.planning.plan import GIB, Planner
from megavtp.planning.search import layouts, search
from megavtp.training.optimizer import parameter_groups

ROOT = Path(__file__).parents[2]
# Large chunks: each is a loop of its own to rehearse.
LARGE_CHUNKS = {"objectives": {"self_distillation": {"chunk": 4096}}}
CONFIG = replace(layout(1, extra=LARGE_CHUNKS), parallel=ParallelConfig(precision="fp32"))


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(CONFIG, lambda named: parameter_groups(named, CONFIG.train.optimizer), find_device("a100"), 2)


def test_every_product_of_sizes_is_looked_at() -> None:
    found = {(p.tp, p.pp, p.zero_stage) for p in layouts(CONFIG.parallel, 4, 2)}
    shared = {(1, 1), (1, 2), (2, 1)}  # tensor parallelism stays inside a node of 2
    alone = {(1, 4), (2, 2)}  # a data-parallel rank alone has nobody to share with
    assert found == {(*sizes, zero) for sizes in shared for zero in (0, 1, 2, 3)} | {(*sizes, 0) for sizes in alone}


def test_the_best_plans_are_legal_fit_and_are_in_order(planner: Planner) -> None:
    found = search(planner, CONFIG, 2, GIB, keep=4)
    assert len(found.fitting) == 4 <= found.count
    assert [p.step_seconds for p in found.fitting] == sorted(p.step_seconds for p in found.fitting)
    for plan in found.fitting:
        assert plan.memory <= GIB
        assert len(plan.ranks) == plan.config.parallel.pp
        pasted = from_dict(merged(to_dict(CONFIG), yaml.safe_load(report.yaml_lines(plan))), Config)
        assert validate(pasted, 2).parallel == plan.config.parallel
    assert len(report.table(found.fitting).splitlines()) == 5


class Scale:
    """A planner in whose plans a means to save memory saves a known part, and costs a known time."""

    gpus_per_node = 2
    FACTOR = {"none": 1.0, "selective": 0.6, "full": 0.2}

    def least_state(self, config: Config, world_size: int) -> float:
        return 0.0

    def plan(self, config: Config, world_size: int, *, draft: bool = False) -> SimpleNamespace:
        p, pairs = config.parallel, config.objectives.contrastive.micro_batch
        memory = pairs * self.FACTOR[p.recompute] / (2 if p.sequence_parallel else 1)
        slower = {"none": 0.0, "selective": 1.0, "full": 2.0}[p.recompute] + (pairs < 16)
        return SimpleNamespace(config=config, memory=memory, step_seconds=10 + slower)


@pytest.mark.parametrize("budget, recompute, pairs", [
    (16, "none", 16), (8, "none", 8), (1, "none", 1), (0.7, "selective", 1), (0.2, "full", 1),
])
def test_the_mildest_means_that_suffices(budget: float, recompute: str, pairs: int) -> None:
    """All pairs at once, then smaller micro-batches, then recomputation."""
    best = search(Scale(), CONFIG, 1, budget).fitting[0].config
    assert (best.parallel.recompute, best.objectives.contrastive.micro_batch) == (recompute, pairs)


def test_nothing_fits(planner: Planner) -> None:
    none = search(planner, CONFIG, 1, 1e5)
    assert not none.fitting and none.closest is not None
    text = report.nothing_fits(none, 1, 1e5)
    assert f"{none.closest.memory / GIB:.1f}" in text and "nothing fits" in text


def test_why_no_layout_is_legal(planner: Planner) -> None:
    found = search(planner, CONFIG, 5, GIB)  # more than blocks for a pipeline, and no divisor of the streams
    assert not found.fitting and found.closest is None
    assert re.search(r"data.streams = 4", report.nothing_fits(found, 1, GIB))


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(UserError, match="device abacus: not known"):
        find_device("abacus")


def test_the_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--gpus", "1", "--memory", "16", "--top", "1"])
    with pytest.raises(SystemExit) as ended:
        run_path(str(ROOT / "tools" / "plan.py"), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert "to paste into the recipe" in said.out and "parameters  vision" in said.out
