"""Every legal layout gives the single-process numbers. Of each two settings some cell with both is run here: for four
steps with tensor and data parallelism, ZeRO, micro-batches and recomputation alone, of which ``make sweeps`` runs all
cells, and for fewer with pipelines and the other settings. ``make matrix`` (``matrix.py``) runs every legal layout.
Every other cell is refused by name."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from distributed import run_ranks
from layouts import BASIC, HEADER, Cell, basic_layouts, cells, legal, pairs, pairwise, run_cells, verdict, whole_matrix
from tiny_run import reference

from megavtp.errors import UserError
from megavtp.pretraining import passes


@pytest.fixture(scope="module")
def candidates() -> list[Cell]:
    return [cell for cell in cells(compile=("none",)) if legal(cell)]


@pytest.fixture(scope="module")
def chosen(candidates: list[Cell]) -> list[Cell]:
    return pairwise(candidates)


def check(
    chosen: list[Cell], world: int, capsys: pytest.CaptureFixture, extra: dict | None = None, timeout: float = 800,
    **options: str,
) -> None:
    """Run those of the cells that have ``world`` processes, and print the table."""
    mine = [cell for cell in chosen if cell.world == world]
    results = run_ranks(world, partial(run_cells, **options), mine, extra, timeout=timeout)[0]
    rows = [(*verdict(cell, outcome, extra), seconds) for cell, (outcome, seconds) in zip(mine, results, strict=True)]
    with capsys.disabled():
        print(f"\n{HEADER}")
        for row, _, seconds in rows:
            print(f"{row}  {seconds:.1f} s")
    assert all(good for _, good, _ in rows), "\n".join(row for row, good, _ in rows if not good)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_layout_matrix(world: int, chosen: list[Cell], capsys: pytest.CaptureFixture) -> None:
    check(chosen, world, capsys)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_basic_layouts(world: int, capsys: pytest.CaptureFixture) -> None:
    check(pairwise(basic_layouts()), world, capsys, BASIC)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_basic_layouts(world: int, capsys: pytest.CaptureFixture) -> None:
    check(basic_layouts(), world, capsys, BASIC, timeout=3500)


COMPILED = [
    Cell(tp=2, sequence_parallel=True, recompute="selective", compile="blocks"),
    Cell(pp=2, zero=0, micro_batches=2, compile="blocks"),
    Cell(dp=2, zero=3, recompute="full", precision="bf16", compile="blocks"),
]


@pytest.mark.timeout(900)
def test_compiled_layouts(capsys: pytest.CaptureFixture) -> None:
    """Through a backend that runs the graphs as they are: what differs between layouts is around them."""
    check(COMPILED, 2, capsys, backend="aot_eager")


@pytest.mark.sweep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_pair_compiled(world: int, capsys: pytest.CaptureFixture) -> None:
    check(pairwise([cell for cell in cells(compile=("blocks",)) if legal(cell)]), world, capsys, timeout=7000)


def test_no_basic_layout_is_left_out(candidates: list[Cell]) -> None:
    found = basic_layouts()
    sizes = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)]  # tp, dp
    wanted = set(itertools.product(sizes, (0, 1, 2, 3), (1, 2), ("none", "full")))
    assert {((c.tp, c.dp), c.zero, c.micro_batches, c.recompute) for c in found} == wanted
    assert len(found) == len(wanted) == 80 and set(found) <= set(candidates)


def test_no_prediction_meets_its_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the slope of L1 jumps, and rounding would decide to which side."""
    apart = []

    def noted(prediction, target, *rest, **options):
        apart.append(float((prediction - target).detach().abs().min()))
        return terms(prediction, target, *rest, **options)

    terms = passes.reconstruction_terms
    monkeypatch.setattr(passes, "reconstruction_terms", noted)
    last = reference(Cell().plain_config(BASIC)).terms[-1]
    assert len(apart) == BASIC["train"]["steps"] and min(apart) > 0.1
    assert {term.split("/")[0] for term in last} == {"contrastive", "self_distillation", "reconstruction"}
    assert "reconstruction/l1" in last


def test_the_chosen_cells_have_every_pair(candidates: list[Cell], chosen: list[Cell]) -> None:
    there = {pair for cell in chosen for pair in pairs(cell)}
    assert there == {pair for cell in candidates for pair in pairs(cell)}
    assert {cell.world for cell in chosen} == {1, 2, 4, 8} and len(chosen) < 40


def test_the_whole_matrix_has_every_legal_layout(candidates: list[Cell]) -> None:
    def layout(cell: Cell) -> frozenset:
        return frozenset(x for x in vars(cell).items() if x[0] not in ("micro_batches", "off", "compile"))

    whole, every = whole_matrix(), [cell for cell in cells() if legal(cell)]
    assert {layout(cell) for cell in whole} == {layout(cell) for cell in candidates}
    assert {pair for cell in whole for pair in pairs(cell)} == {pair for cell in every for pair in pairs(cell)}
    assert len(whole) == len({layout(cell) for cell in whole})


def test_every_other_cell_is_refused_by_name() -> None:
    refused = 0
    for cell in cells(off=("",), micro_batches=(1,), precision=("fp32",), zero=(1,), compile=("none",)):
        if legal(cell):
            cell.config()
            continue
        with pytest.raises(UserError) as error:
            cell.config()
        message = str(error.value)
        keys = {"parallel.schedule", "parallel.pp"}, {"parallel.sequence_parallel", "parallel.tp"}
        assert any(all(key in message for key in two) for two in keys), message
        refused += 1
    assert refused > 100
