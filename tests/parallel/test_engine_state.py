"""A run's state goes from layout to layout without changing a bit, and training goes on from it everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from layouts import SECOND_STAGE, Cell, Run, differences
from tiny_run import Outcome, merged, reference

from megavtp.checkpoint.store import CheckpointStore, find_latest, open_checkpoint
from megavtp.training import state

# Softmax centering: its running means are state as well.
SETTINGS = {"objectives": {"self_distillation": {"centering": "softmax"}}}
CHAIN = [
    Cell(zero=0), Cell(tp=2, zero=1), Cell(dp=2, zero=3), Cell(pp=2, zero=2, schedule="gpipe", micro_batches=2),
    Cell(tp=2, pp=2, zero=3, sequence_parallel=True), Cell(pp=2, dp=2, zero=1, schedule="interleaved_1f1b"),
    Cell(pp=4, zero=3, recompute="full"), Cell(dp=4, zero=2), Cell(zero=0),
]
SECOND_CHAIN = [
    Cell(zero=0), Cell(tp=2, zero=1), Cell(pp=2, zero=3, micro_batches=2), Cell(dp=2, zero=2), Cell(zero=0),
]
STEPS, SAVED = 4, 2  # in all, and before the first checkpoint
STAGES = {  # what is set, the layouts, the kinds of state, and a sample of the last
    "pre-training": (SETTINGS, CHAIN, "center", "center/cls", "model/teacher."),
    "second stage": (
        SECOND_STAGE, SECOND_CHAIN, "direction", "direction/heads.1.mix.weight", "model/averaged_decoder.",
    ),
}


def settings(stage: str) -> dict:
    return merged(STAGES[stage][0], {"train": {"steps": STEPS}})


def _link(rank: int, stage: str, layout: Cell, source: Path | None, target: Path) -> Outcome | None:
    """Take the state over from ``source`` (or train for it), hand it on to ``target``, then train to the end."""
    config = layout.config(settings(stage))
    run = Run(config=config)
    if source is None:
        run.train(0, SAVED)
        run.terms.clear(), run.norms.clear()
    else:
        with open_checkpoint(find_latest(source)) as checkpoint:
            assert state.load(checkpoint, run.engine, run.passes) == SAVED
    store = CheckpointStore(target, keep_last=1, run_token="chain")
    state.save(store, run.engine, run.passes, config, SAVED)
    run.train(SAVED)  # while the checkpoint is being written: it must hold the state of before
    store.wait()
    outcome = run.outcome()
    run.engine.close()
    return outcome if rank == 0 else None


@dataclass(frozen=True)
class Chain:
    stage: str
    links: list[Outcome]
    folders: list[Path]
    uninterrupted: Outcome


@pytest.fixture(scope="module", params=STAGES)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    stage, layouts = request.param, STAGES[request.param][1]
    links, folders = [], [tmp_path_factory.mktemp(f"link{number}") for number in range(len(layouts))]
    for number, layout in enumerate(layouts):
        source = folders[number - 1] if number else None
        links.append(run_ranks(layout.world, _link, stage, layout, source, folders[number])[0])
    whole = reference(layouts[0].plain_config(settings(stage)))
    return Chain(stage, links, folders, Outcome(whole.terms[SAVED:], whole.norms[SAVED:], whole.weights))


@pytest.mark.timeout(300)
def test_state_is_bit_equal_on_every_layout(chain: Chain) -> None:
    """Weights, averages, moments, what the passes carry and Adam's step count, in each checkpoint of the chain."""
    _, layouts, kind, carried, average = STAGES[chain.stage]
    with open_checkpoint(find_latest(chain.folders[0])) as first:
        assert {name.split("/")[0] for name in first.names} == {"model", "exp_avg", "exp_avg_sq", kind}
        assert any(name.startswith(average) for name in first.names)
        assert first.tensor(carried).abs().max() > 0
        assert sum(first.tensor(name).abs().sum() > 0 for name in first.names if name.startswith("exp_avg_sq/")) > 10
        for layout, folder in zip(layouts[1:], chain.folders[1:], strict=True):
            with open_checkpoint(find_latest(folder)) as other:
                assert other.names == first.names and other.step == first.step == SAVED
                assert other.meta["optimizer_steps"] == first.meta["optimizer_steps"] == SAVED
                for name in first.names:
                    assert other.dtype(name) == torch.float32
                    assert torch.equal(other.tensor(name), first.tensor(name)), (layout, name)


def test_training_goes_on_on_every_layout(chain: Chain) -> None:
    """Each layout of the chain trains to the end as one process does that was never interrupted."""
    for layout, link in zip(STAGES[chain.stage][1], chain.links, strict=True):
        found = differences(link, chain.uninterrupted)
        assert found.exact, f"{layout}: {found}"
