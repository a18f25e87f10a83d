"""Every pair of tp, pp, dp and ZeRO stage trains the DiT to the single-process numbers; checkpoints fit any layout."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from dit_cells import Cell, CellRun, Outcome, cells, plain
from latent_folder import FINGERPRINT, random_latents

from megavtp.checkpoint.store import CheckpointStore, open_checkpoint
from megavtp.dit.checkpoint import load_dit
from megavtp.nn import compiling
from megavtp.parallel.collectives import all_gather_object
from megavtp.training import state

TOLERANCE = 1e-5  # relative, float32
SHORT = 2  # steps in each cell


def _run_cells(rank: int, chosen: list[Cell], root: Path, backend: str = compiling.BACKEND) -> list[Outcome]:
    compiling.BACKEND = backend
    outcomes = []
    for cell in chosen:
        run = CellRun(cell.config(root))
        outcomes.append(run.train(0, SHORT))
        run.engine.close()
    return outcomes if rank == 0 else []


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    # 9 tokens, which no tensor-parallel size divides.
    return random_latents(tmp_path_factory.mktemp("data") / "latents", shape=(4, 6, 6), captions=6)


@pytest.fixture(scope="module")
def expected(root) -> dict[str, Outcome]:
    cells = [Cell(1, 1, 1, 0, condition=condition) for condition in ("class", "caption")]
    return {cell.condition: plain(cell.config(root), SHORT) for cell in cells}


def test_the_reference_moves_everything(expected):
    for outcome in expected.values():
        terms = [value for step in outcome.terms for value in step.values()]
        assert all(0.1 < value < 50 for value in terms), terms
        for name, weight in outcome.weights.items():
            assert name.startswith("dit.") or not torch.equal(weight, outcome.weights["dit." + name[4:]]), name


def test_each_pair_of_settings_occurs() -> None:
    names = ("tp", "pp", "dp", "zero")
    for a, b in itertools.combinations(names, 2):
        values = {(getattr(cell, a), getattr(cell, b)) for cell in cells() if cell.tp < 4}
        assert len(values) == (8 if b == "zero" else 4), (a, b)
    pipelined = [cell for cell in cells() if cell.pp > 1]
    assert {cell.schedule for cell in pipelined} == {"gpipe", "1f1b", "interleaved_1f1b"}
    assert {cell.recompute for cell in cells()} == {"none", "selective", "full"}
    assert {cell.recompute for cell in cells() if cell.sequence_parallel} == {"none", "selective", "full"}
    assert {cell.condition for cell in cells()} == {"class", "caption"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_layouts(world: int, root: Path, expected: dict[str, Outcome], capsys: pytest.CaptureFixture) -> None:
    check([cell for cell in cells() if cell.world == world], root, expected, capsys)


COMPILED = [
    Cell(2, 1, 1, 1, 2, recompute="full", sequence_parallel=True, compile="blocks"),
    Cell(1, 1, 2, 3, recompute="selective", condition="caption", compile="blocks"),
]


@pytest.mark.timeout(600)
def test_compiled_layouts(root: Path, expected: dict[str, Outcome], capsys: pytest.CaptureFixture) -> None:
    """Through a backend that runs the graphs as they are: what differs between layouts is around them."""
    check(COMPILED, root, expected, capsys, "aot_eager")


@pytest.mark.sweep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_all_compiled(world: int, root: Path, expected: dict[str, Outcome], capsys: pytest.CaptureFixture) -> None:
    check([replace(cell, compile="blocks") for cell in cells() if cell.world == world], root, expected, capsys)


def check(
    chosen: list[Cell], root: Path, expected: dict[str, Outcome], capsys: pytest.CaptureFixture, *backend: str
) -> None:
    outcomes = run_ranks(chosen[0].world, _run_cells, chosen, root, *backend, timeout=500)[0]
    found = {cell: outcome.difference(expected[cell.condition]) for cell, outcome in zip(chosen, outcomes, strict=True)}
    with capsys.disabled():
        print("".join(f"\n{cell}: {difference:.1e}" for cell, difference in found.items()))
    assert max(found.values()) < TOLERANCE


ROUNDED = [Cell(1, 2, 1, 1, 2, precision="bf16"), Cell(2, 1, 1, 3, precision="bf16", condition="caption")]


def test_16_bit_compute_is_near(root: Path, expected: dict[str, Outcome]) -> None:
    """What flows between stages and into the loss stays in float32."""
    for cell, outcome in zip(ROUNDED, run_ranks(2, _run_cells, ROUNDED, root)[0], strict=True):
        for found, exact in zip(outcome.terms, expected[cell.condition].terms, strict=True):
            assert found == pytest.approx(exact, rel=0.02) and found != pytest.approx(exact, rel=1e-6)


CHAIN = [Cell(1, 1, 1, 0), Cell(2, 1, 1, 3, 2), Cell(1, 2, 1, 1, 2, "interleaved_1f1b")]  # a step each


def _chain(rank: int, root: Path, folder: Path, first: int, links: list[Cell]) -> list[Outcome]:
    """From step ``first`` on, a step in each layout, from and to checkpoints."""
    outcomes = []
    for step, cell in enumerate(links, first):
        run = CellRun(cell.config(root))
        if step:
            with open_checkpoint(folder / f"step-{step:08d}") as checkpoint:
                assert state.load(checkpoint, run.engine, run.passes) == step
        outcomes.append(run.train(step, step + 1))
        store = CheckpointStore(folder, len(CHAIN), run_token=f"chain{step}")
        state.save(store, run.engine, run.passes, run.config, step + 1, run.recipe.facts())
        store.wait()
        all_gather_object(None)  # published by rank 0, and so by all
        run.engine.close()
    return outcomes if rank == 0 else []


@pytest.mark.timeout(300)
def test_a_step_on_each_layout(root: Path, tmp_path: Path) -> None:
    expected = plain(CHAIN[0].config(root), len(CHAIN))
    outcomes = run_ranks(1, _chain, root, tmp_path, 0, CHAIN[:1])[0]
    outcomes += run_ranks(2, _chain, root, tmp_path, 1, CHAIN[1:])[0]
    whole = Outcome(sum((o.terms for o in outcomes), []), sum((o.norms for o in outcomes), []), outcomes[-1].weights)
    assert whole.difference(expected) < TOLERANCE
    for average in (True, False):  # and any of them is a DiT to sample from
        dit = load_dit(tmp_path / "latest", average=average)
        assert dit.step == len(CHAIN) and dit.artifact.fingerprint == FINGERPRINT
        prefix = "ema." if average else "dit."
        for name, parameter in dit.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), whole.weights[prefix + name], rtol=0, atol=0)
