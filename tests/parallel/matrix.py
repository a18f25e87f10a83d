"""The whole layout matrix as a table: ``make matrix``, or ``python tests/parallel/matrix.py zero=3 pp=2,4``.

Every legal cell of tp, pp, dp, ZeRO stage, schedule, recompute, precision and sequence parallelism on up to 8 gloo
processes of this machine, with all micro-batch counts, switched-off objectives and compiled blocks in turn, against one
process. Takes some 100 minutes on two cores, and compiling as long again: key=value,... narrows it. Ends with status 1
if a cell differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from distributed import run_ranks  # noqa: E402
from layouts import AXES, HEADER, Cell, run_cells, verdict, whole_matrix  # noqa: E402

_AT_ONCE = 24  # cells in one start of the processes
_PATIENCE = 200  # seconds for one cell


def wanted(arguments: list[str]) -> list[Cell]:
    """The cells that ``key=value,value ...`` leaves, grouped by their number of processes."""
    cells = whole_matrix()
    for argument in arguments:
        key, _, values = argument.partition("=")
        known = {str(value) for value in AXES.get(key, ())}
        if not known or not set(values.split(",")) <= known:
            sys.exit(f"error: {argument}: say key=value,... with {', '.join(f'{k} of {v}' for k, v in AXES.items())}")
        cells = [cell for cell in cells if str(getattr(cell, key)) in values.split(",")]
    return sorted(cells, key=lambda cell: cell.world)


def batches(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Up to ``_AT_ONCE`` cells of as many processes each."""
    for world in sorted({cell.world for cell in cells}):
        same = [cell for cell in cells if cell.world == world]
        for start in range(0, len(same), _AT_ONCE):
            yield same[start : start + _AT_ONCE]


def main() -> int:
    cells, bad = wanted(sys.argv[1:]), 0
    print(f"{len(cells)} cells\n{HEADER}", flush=True)
    for some in batches(cells):
        results = run_ranks(some[0].world, run_cells, some, timeout=_PATIENCE * len(some))[0]
        for cell, (outcome, _) in zip(some, results, strict=True):
            row, good = verdict(cell, outcome)
            bad += not good
            print(row, flush=True)
    print(f"{len(cells) - bad} of {len(cells)} cells equal the single process")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
