"""The report page of a study: its answer first, then its cells, curves, pictures and failures."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megavtp.errors import UserError
from megavtp.report.charts import Fitted, check_matplotlib, draw_fitted
from megavtp.report.measures import shown
from megavtp.report.page import render
from megavtp.report.pictures import Picture, read_picture
from megavtp.study.answers import answers, remarks
from megavtp.study.cells import Cell, cells_of, links_of
from megavtp.study.config import STUDY, StudyConfig, load_study
from megavtp.study.curves import Fits, fit_results
from megavtp.study.pages import cell_state, cost_text, flops_text, hours_taken, records_of
from megavtp.study.record import failure, read_record
from megavtp.study.results import Row, rows_of


def study_file(paths: Sequence[Path]) -> Path | None:
    """Return the file of the study that the paths name: the file itself, or its folder; None if they name runs.

    UserError: a study stands among other paths, or its folder has another name or place than it says of itself.
    """
    found = [path if path.is_file() else path / STUDY for path in paths]
    studies = [path for path in found if path.suffix in (".yaml", ".yml") and path.is_file()]
    if studies and len(paths) > 1:
        raise UserError(f"{studies[0]} is a study, which has a page of its own; name it alone")
    if studies and paths[0].is_dir() and Path(own := load_study(studies[0]).output_dir).resolve() != paths[0].resolve():
        raise UserError(
            f"{paths[0]} has a copy of the study whose folder is {own}, seen from here; name that folder, or the file "
            "of a study whose output_dir is this one"
        )
    return studies[0] if studies else None


def render_study(path: Path) -> str:
    """Return the page about the study in a YAML file, as HTML; equal folders give equal text.

    UserError: the file is wrong, a file of the study is damaged or of another study, or matplotlib is not installed.
    """
    check_matplotlib()
    study = load_study(path)
    cells = cells_of(study)
    rows = rows_of(cells)
    fits = fit_results(study, rows)
    left_out: list[str] = []
    failed = [failure(link) for link in links_of(cells) if (record := read_record(link)) and record.state == "failed"]
    seen: set[Path] = set()
    pictures = [(cell.name, _pictures(study, cell, seen, left_out)) for cell in cells]
    return render(
        "study.html", name=path.stem if path.name != STUDY else path.parent.name, folder=study.output_dir,
        answers=answers(study, fits, len(rows), len(cells)), remarks=remarks(fits), failed=failed,
        measures=list(study.curves.better), cost=cost_text(cells), cells=_table(study, cells, rows),
        charts=_charts(study, fits), lines=_line_names(fits),
        pictures=[pair for pair in pictures if pair[1]], left_out=left_out,
        again=[shlex.join(["python", "tools/study.py", "run", str(path)]),
               shlex.join(["python", "tools/report.py", str(path), "--out", "report.html"])],
    )


def _table(study: StudyConfig, cells: Sequence[Cell], rows: Sequence[Row]) -> list[list[str]]:
    """Return a row for each cell: name, state, operations, hours, device-hours, and each measure of the curves."""
    values = {row["cell"]: row for row in rows}
    return [
        [
            cell.name, cell_state(records)[1], flops_text(cell.flops), flops_text(cell.all_flops),
            *hours_taken(records),
            *(shown(measure, values.get(cell.name, {}).get(measure)) for measure in study.curves.better),
        ]
        for cell, records in ((cell, records_of(cell)) for cell in cells)
    ]


def _line_names(fits: Fits) -> list[str]:
    return list(dict.fromkeys(line.line for line in fits.lines))


def _charts(study: StudyConfig, fits: Fits) -> list[tuple[str, str]]:
    """Return the title and the SVG element of a chart for each measure."""
    numbers = {name: number for number, name in enumerate(_line_names(fits))}
    found = []
    for measure in fits.noise:
        lines = [
            Fitted(
                numbers[line.line], np.array([(point.x, point.y) for point in line.points]),
                np.array([
                    (place.x, place.y, place.interval.low, place.interval.high)
                    for place in (line.fit.curve if line.fit else ())
                ]),
            )
            for line in fits.lines if line.measure == measure
        ]
        title = f"{measure} ({study.curves.better[measure]} is better) over {fits.x}"
        found.append((title, draw_fitted(title, lines)))
    return found


def _pictures(study: StudyConfig, cell: Cell, seen: set[Path], left_out: list[str]) -> list[Picture]:
    """Return the reconstructions and the drawn pictures of a cell, as far as they are there and not yet ``seen``."""
    kinds = {"evaluate": ("reconstructions.png", "reconstructions"), "draw": ("samples.png", "drawn")}
    found = []
    for link in cell.links:
        if link.kind in kinds and (path := link.folder / kinds[link.kind][0]).exists() and path not in seen:
            seen.add(path)
            caption = f"{cell.name}: {kinds[link.kind][1]}"
            found.append(read_picture(path, caption, Path(study.output_dir), left_out, small=True))
    return [picture for picture in found if picture is not None]
