"""The second stage with its discriminator on every layout, as plain torch on one process."""

from __future__ import annotations

import pytest
from distributed import run_ranks
from layouts import SECOND_STAGE, cells, pairwise, run_cells, verdict
from tiny_run import merged

STAGE = merged(SECOND_STAGE, {"train": {"steps": 3}})


def check(cells, world, extra=STAGE):
    results = run_ranks(world, run_cells, cells, extra, timeout=500)[0]
    rows = [verdict(cell, outcome, extra) for cell, (outcome, _) in zip(cells, results, strict=True)]
    print("\n".join(row for row, _ in rows))
    assert rows and all(good for _, good in rows), "\n".join(row for row, _ in rows)


SETTINGS = {
    "schedule": ("1f1b",), "recompute": ("none",), "precision": ("fp32",), "sequence_parallel": (False,), "off": ("",),
}
EVERY = cells(tp=(1, 2), pp=(1, 2), dp=(1, 2), micro_batches=(1, 2), **SETTINGS)
LAYOUTS = pairwise([cell for cell in EVERY if cell.world <= 4])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_layouts(world):
    check([cell for cell in LAYOUTS if cell.world == world], world)
