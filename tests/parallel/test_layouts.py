"""Every legal layout gives the single-process numbers; of each two settings some cell with both is run here, the whole
matrix by ``make matrix`` (``matrix.py``). Every other cell is refused by name."""

from __future__ import annotations

import pytest
from distributed import run_ranks
from layouts import HEADER, Cell, cells, legal, pairs, pairwise, run_cells, verdict, whole_matrix

from megavtp.errors import UserError


@pytest.fixture(scope="module")
def candidates() -> list[Cell]:
    return [cell for cell in cells() if legal(cell)]


@pytest.fixture(scope="module")
def chosen(candidates: list[Cell]) -> list[Cell]:
    return pairwise(candidates)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_layout_matrix(world: int, chosen: list[Cell], capsys: pytest.CaptureFixture) -> None:
    mine = [cell for cell in chosen if cell.world == world]
    results = run_ranks(world, run_cells, mine, timeout=800)[0]
    rows = [(*verdict(cell, outcome), seconds) for cell, (outcome, seconds) in zip(mine, results, strict=True)]
    with capsys.disabled():
        print(f"\n{HEADER}")
        for row, _, seconds in rows:
            print(f"{row}  {seconds:.1f} s")
    assert all(good for _, good, _ in rows), "\n".join(row for row, good, _ in rows if not good)


def test_the_chosen_cells_have_every_pair(candidates: list[Cell], chosen: list[Cell]) -> None:
    there = {pair for cell in chosen for pair in pairs(cell)}
    assert there == {pair for cell in candidates for pair in pairs(cell)}
    assert {cell.world for cell in chosen} == {1, 2, 4, 8} and len(chosen) < 40


def test_the_whole_matrix_has_every_legal_layout(candidates: list[Cell]) -> None:
    layout = lambda cell: frozenset(x for x in vars(cell).items() if x[0] not in ("micro_batches", "off"))  # noqa: E731
    whole = whole_matrix()
    assert {layout(cell) for cell in whole} == {layout(cell) for cell in candidates}
    assert {pair for cell in whole for pair in pairs(cell)} == {pair for cell in candidates for pair in pairs(cell)}
    assert len(whole) == len({layout(cell) for cell in whole})


def test_every_other_cell_is_refused_by_name() -> None:
    refused = 0
    for cell in cells(off=("",), micro_batches=(1,), precision=("fp32",), zero=(1,)):
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
