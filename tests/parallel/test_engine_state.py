"""A run's state goes from layout to layout without changing a bit, and training goes on from it everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from layouts import Cell, Run, differences
from tiny_run import reference, tiny_config
from torch import Tensor

from megavtp.checkpoint.store import CheckpointStore, find_latest, open_checkpoint
from megavtp.training import state
from megavtp.training.pretraining import SelfDistillationPass

# Softmax centering: its running means are state as well.
SETTINGS = {"objectives": {"self_distillation": {"centering": "softmax"}}}
CHAIN = [(1, 1, 0), (2, 1, 1), (1, 2, 3), (2, 2, 2), (1, 4, 3), (1, 1, 0)]  # (tp, dp, ZeRO stage)
SAVED = 2  # steps before the first checkpoint
TOLERANCE = 1e-5


@dataclass
class Link:
    """What one layout of the chain saw: its continuation from step ``SAVED`` on."""

    terms: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def _link(rank: int, layout: tuple[int, int, int], source: Path | None, target: Path) -> Link | None:
    """Take the state over from ``source`` (or train for it), hand it on to ``target``, then train to the end."""
    tp, dp, zero = layout
    config = Cell(tp, dp, zero, micro_batches=1, recompute=False).config(SETTINGS)
    run = Run(config)
    distillation = next(p for p in run.passes if isinstance(p, SelfDistillationPass))
    if source is None:
        run.train(0, SAVED)
        run.terms.clear(), run.norms.clear()
    else:
        with open_checkpoint(find_latest(source)) as checkpoint:
            assert state.load(checkpoint, run.engine, distillation) == SAVED
    store = CheckpointStore(target, keep_last=1, run_token="chain")
    state.save(store, run.engine, config, SAVED, distillation.centers)
    run.train(SAVED)  # while the checkpoint is being written: it must hold the state of before
    store.wait()
    link = Link(run.terms, run.norms, run.weights())
    run.engine.close()
    return link if rank == 0 else None


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Link], list[Path]]:
    links, folders = [], [tmp_path_factory.mktemp(f"link{number}") for number in range(len(CHAIN))]
    for number, layout in enumerate(CHAIN):
        source = folders[number - 1] if number else None
        links.append(run_ranks(layout[0] * layout[1], _link, layout, source, folders[number])[0])
    return links, folders


@pytest.mark.timeout(300)
def test_state_is_bit_equal_on_every_layout(chain: tuple) -> None:
    """Weights, teacher, moments, centres and Adam's step count, in each checkpoint of the chain."""
    with open_checkpoint(find_latest(chain[1][0])) as first:
        kinds = {name.split("/")[0] for name in first.names}
        assert kinds == {"model", "exp_avg", "exp_avg_sq", "center"}
        assert any(name.startswith("model/teacher.") for name in first.names)
        assert all(first.tensor(f"center/{name}").abs().max() > 0 for name in ("cls", "patches"))
        assert sum(first.tensor(name).abs().sum() > 0 for name in first.names if name.startswith("exp_avg_sq/")) > 10
        for layout, folder in zip(CHAIN[1:], chain[1][1:], strict=True):
            with open_checkpoint(find_latest(folder)) as other:
                assert other.names == first.names and other.step == first.step == SAVED
                assert other.meta["optimizer_steps"] == first.meta["optimizer_steps"] == SAVED
                for name in first.names:
                    assert other.dtype(name) == torch.float32
                    assert torch.equal(other.tensor(name), first.tensor(name)), (layout, name)


@pytest.mark.parametrize("number", range(len(CHAIN)), ids=lambda n: "tp{} dp{} zero{}".format(*CHAIN[n]))
def test_training_goes_on_on_every_layout(number: int, chain: tuple, uninterrupted: tuple) -> None:
    """Each layout of the chain trains to the end as one process does that was never interrupted."""
    link = chain[0][number]
    found = differences((link.terms, link.norms, link.weights), uninterrupted)
    assert max(found) < TOLERANCE, found


@pytest.fixture(scope="module")
def uninterrupted() -> tuple:
    terms, norms, weights = reference(tiny_config(SETTINGS))
    return terms[SAVED:], norms[SAVED:], weights
