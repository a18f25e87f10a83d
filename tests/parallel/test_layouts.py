"""Every legal layout on up to 4 processes gives the single-process numbers, all three objectives on."""

from __future__ import annotations

import pytest
from distributed import run_ranks
from layouts import CELLS, LAYOUTS, Cell, differences, run_cell
from tiny_run import reference, tiny_config

TOLERANCE = 1e-5  # relative, float32, after 4 steps


def _run_cells(rank: int, cells: list[Cell]) -> list[tuple]:
    results = [run_cell(cell.config()) for cell in cells]
    return results if rank == 0 else []


@pytest.fixture(scope="module")
def expected() -> tuple:
    return reference(tiny_config())


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_layout_matrix(tp: int, dp: int, expected: tuple, capsys: pytest.CaptureFixture) -> None:
    cells = [cell for cell in CELLS if (cell.tp, cell.dp) == (tp, dp)]
    results = run_ranks(tp * dp, _run_cells, cells, timeout=800)[0]
    rows, bad = [], []
    for cell, result in zip(cells, results, strict=True):
        found = differences(result, expected)
        ok = max(found) < TOLERANCE
        row = (
            f"tp {cell.tp} dp {cell.dp} ZeRO {cell.zero} micro-batches {cell.micro_batches} "
            f"recompute {'on ' if cell.recompute else 'off'}  terms {found[0]:.1e}  norm {found[1]:.1e}  "
            f"weights {found[2]:.1e}  {'equal' if ok else 'DIFFERS'}"
        )
        rows.append(row)
        if not ok:
            bad.append(row)
    with capsys.disabled():
        print("\n" + "\n".join(rows))
    assert not bad, "\n".join(bad)
