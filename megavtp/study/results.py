"""The results of a study: a table with a row for each finished cell, as CSV and JSON, and the curves through it."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megavtp.data.files import write_atomic, write_json
from megavtp.study.cells import Cell, links_of
from megavtp.study.config import COLUMNS, StudyConfig
from megavtp.study.curves import fit_results
from megavtp.study.locks import alone
from megavtp.study.record import check_unchanged, is_finished, read_metrics, read_record
from megavtp.training.output_dir import writing

Row = dict[str, Any]
TABLE = "results"  # .csv and .json in the study's folder
_LOCK = "results.lock"


def rows_of(cells: list[Cell]) -> list[Row]:
    """Return a row for each cell whose links have all finished: what it is, what it cost, what was measured.

    UserError: a link was begun with other settings than those of the cells, or metrics are damaged.
    """
    links, rows = links_of(cells), []
    records = {link.folder: read_record(link) for link in links}
    for link in links:
        check_unchanged(link, records[link.folder])
    for cell in cells:
        if not all(is_finished(link, records[link.folder]) for link in cell.links):
            continue
        metrics: dict[str, float] = {}
        for link in cell.links:
            if link.kind in ("evaluate", "generate"):
                metrics |= read_metrics(link)
        facts = (cell.name, cell.look, cell.seed, cell.samples, cell.flops, cell.all_flops, cell.encoder)
        rows.append(cell.choices | dict(zip(COLUMNS, facts)) | dict(sorted(metrics.items())))
    return rows


def write_results(study: StudyConfig, cells: list[Cell]) -> None:
    """Write the table of the cells that have finished, and the curves through it; equal results give equal bytes.

    Of several processes one does so at a time, from the records as they are then: what stands there at last has all.
    UserError: a file cannot be written, and as ``rows_of``.
    """
    folder = Path(study.output_dir)
    with alone(folder / _LOCK, "another process writes the results"), writing(folder / TABLE):
        rows = rows_of(cells)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        fits = fit_results(study, rows)
        write_atomic(folder / f"{TABLE}.csv", text.getvalue().encode())
        write_json(folder / f"{TABLE}.json", {"rows": rows, "curves": asdict(fits)}, indent=1)
