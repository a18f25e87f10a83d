"""What the planner says is sent, kept and where, against tiny runs on gloo processes: to the byte."""

from __future__ import annotations

import pytest
from distributed import run_ranks
from planned_runs import layout, measure, plan_of

from megavtp.config.schema import Config
from megavtp.pretraining.rehearsal import play_pretraining

pytestmark = pytest.mark.timeout(900)  # the runs take two minutes, and more on a machine that does other work, too

TWO = [layout(2, micro, zero_stage=zero) for zero, micro in ((0, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2))]
FOUR = [
    layout(4, 1, tp=2, zero_stage=0),
    layout(4, 2, tp=2, zero_stage=1, recompute="full"),
    layout(4, 1, tp=2, zero_stage=2, recompute="selective", sequence_parallel=True),
    layout(4, 2, tp=2, zero_stage=3, recompute="full"),
    layout(4, 2, pp=2, zero_stage=3),
    layout(4, 2, pp=2, zero_stage=3, zero3_gather="step", schedule="gpipe"),
    layout(4, 4, tp=2, pp=2, zero_stage=1, schedule="interleaved_1f1b", virtual_stages=2, precision="bf16"),
    layout(4, 2, pp=2, zero_stage=3, schedule="interleaved_1f1b", virtual_stages=2),
]
CASES = [(2, config) for config in TWO] + [(4, config) for config in FOUR]


@pytest.fixture(scope="module")
def measured() -> dict[int, list[list[tuple]]]:
    """World size -> rank -> what ``measure`` found of each configuration."""
    return {2: run_ranks(2, measure, TWO, timeout=400), 4: run_ranks(4, measure, FOUR, timeout=400)}


def label(case: tuple[int, Config]) -> str:
    p = case[1].parallel
    layout_of = f"tp{p.tp}-pp{p.pp}-zero{p.zero_stage}-{p.schedule}-{p.recompute}"
    return f"{layout_of}-m{case[1].objectives.contrastive.micro_batch}"


@pytest.mark.parametrize("case", CASES, ids=map(label, CASES))
def test_bytes_sent_and_kept(case: tuple[int, Config], measured: dict) -> None:
    """Every axis and operation of every rank; and weights, optimizer and teacher where they lie."""
    world_size, config = case
    index = (TWO if world_size == 2 else FOUR).index(config)
    plan = plan_of(config, world_size)
    for found in measured[world_size]:
        pp_rank, sent, _, state = found[index]
        planned = plan.ranks[pp_rank]
        assert sent == dict(planned.sent)
        assert state == {name: getattr(planned.state, name) for name in state}


@pytest.mark.parametrize("index, rank", [
    (6, 0), (7, 3), *(pytest.param(*others, marks=pytest.mark.sweep) for others in ((2, 0), (2, 3), (6, 3), (7, 0))),
])
def test_a_rehearsed_rank_sends_the_same(index: int, rank: int, measured: dict) -> None:
    """Bytes and calls of each kind, on the first rank or the last."""
    played = play_pretraining(FOUR[index], 4, rank, fused_norms=False)
    assert (played.traffic.sent, played.traffic.messages) == measured[4][rank][index][1:3]
