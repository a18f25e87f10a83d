"""What was measured of the runs, as tables with a column for each run, for what it is compared with, and for chance."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavtp.errors import UserError
from megavtp.evaluation.report import CHANCE, show_metric
from megavtp.json_file import check_form, read_json
from megavtp.report.folder import Number, Run

_TITLES = {"evaluation.json": "Tokenizer", "generation.json": "Generated pictures"}
_FRIENDLY = ("samples", "reference_samples")
_LOWER = re.compile(r"(lpips|fd_|kd_|gfid|rfid|kid|loss|error)")  # in the last part of a name: lower is better
_NEUTRAL = re.compile(r"(samples$|_std|std_)")
_METRICS, _COMPARE, _SKIPPED, _NOTES = "metrics", "compare", "skipped", "notes"
_REMEDY = "measure again"
_MOST_TEXT = 300  # characters of one note


@dataclass(frozen=True)
class Measured:
    """One file of metrics: those of the run, those it is compared with by name, and remarks."""

    metrics: Mapping[str, Number]
    compare: Mapping[str, Mapping[str, Number]]
    remarks: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """A value as text. ``share`` is it in percent if it is a share; ``best`` marks the best of several runs."""

    text: str
    share: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    name: str
    better: str
    cells: Sequence[Cell]
    chance: Cell


@dataclass(frozen=True)
class Table:
    """Metrics of the files of one name. ``runs`` has a run's number for each column that is a run's, else None."""

    title: str
    columns: Sequence[str]
    runs: Sequence[int | None]
    rows: Sequence[Row]
    remarks: Sequence[str]
    has_chance: bool


def read_measures(run: Run) -> dict[str, Measured]:
    """Return what the JSON files at the top of a run's folder measure, by the files' names, the known ones first.

    Files that hold no metrics are passed over; those that are damaged are named in ``run.left_out``.
    """
    found: dict[str, Measured] = {}
    names = sorted(path.name for path in run.path.glob("*.json"))
    for name in sorted(names, key=lambda name: name not in _TITLES):
        path = run.path / name
        try:
            content = read_json(path, dict[str, Any], _REMEDY)
            if _METRICS in content or name in _TITLES:
                found[name] = _measured(content, str(path))
        except UserError as error:
            run.left_out.append(str(error))
    return found


def _measured(content: Mapping[str, Any], where: str) -> Measured:
    """Take apart a file of tools/evaluate.py, or one of a training run, which has the metrics at its top."""
    metrics = content.get(_METRICS, {key: value for key, value in content.items() if "/" in key or key in _FRIENDLY})
    checked = check_form(metrics, dict[str, Number], where, _REMEDY)
    compare = check_form(content.get(_COMPARE, {}), dict[str, Any], where, _REMEDY) | {
        key: value for key, value in content.items()
        if isinstance(value, Mapping) and key != _METRICS and checked.keys() & value.keys()
    }
    others = check_form(compare, dict[str, dict[str, Number]], where, _REMEDY)
    skipped = check_form(content.get(_SKIPPED, {}), dict[str, str], where, _REMEDY)
    notes = check_form(content.get(_NOTES, []), list[str], where, _REMEDY)
    remarks = [*(f"left out: {name}: {why}" for name, why in skipped.items()), *notes]
    return Measured(checked, others, [remark[:_MOST_TEXT] for remark in remarks])


def tables(runs: Sequence[Run], measured: Sequence[Mapping[str, Measured]]) -> list[Table]:
    """Make a table for each name of a file; ``measured`` has each run's files."""
    names = list(dict.fromkeys(name for files in measured for name in files))
    names.sort(key=lambda name: name not in _TITLES)
    return [_table(name, runs, [files.get(name) for files in measured]) for name in names]


def _table(name: str, runs: Sequence[Run], files: Sequence[Measured | None]) -> Table:
    there = [(number, file) for number, file in enumerate(files) if file is not None]
    columns: list[tuple[str, int | None, Mapping[str, Number]]] = [
        (runs[number].label, number, file.metrics) for number, file in there
    ]
    for number, file in there:
        whose = f"{runs[number].label}: " if len(there) > 1 else ""
        columns += [(whose + other, None, values) for other, values in file.compare.items()]
    metrics = list(dict.fromkeys(key for _, file in there for key in file.metrics if not key.startswith(CHANCE)))
    rows = [_row(key, columns, [file.metrics.get(CHANCE + key) for _, file in there]) for key in metrics]
    return Table(
        title=_TITLES.get(name, Path(name).stem.replace("_", " ")), columns=[label for label, _, _ in columns],
        runs=[number for _, number, _ in columns], rows=rows,
        remarks=list(dict.fromkeys(remark for _, file in there for remark in file.remarks)),
        has_chance=any(row.chance.text for row in rows),
    )


def _row(
    metric: str, columns: Sequence[tuple[str, int | None, Mapping[str, Number]]], chances: Sequence[Number]
) -> Row:
    better = _better(metric)
    values = [values.get(metric) for _, _, values in columns]
    of_runs = [value for value, (_, number, _) in zip(values, columns) if number is not None and value is not None]
    best = None
    if better and len(of_runs) > 1:
        best = min(of_runs) if better == "lower" else max(of_runs)
    cells = [
        Cell(shown(metric, value), _share(metric, value), None not in (number, value) and value == best)
        for value, (_, number, _) in zip(values, columns)
    ]
    told = dict.fromkeys(shown(metric, chance) for chance in chances if chance is not None)
    known = next((chance for chance in chances if chance is not None), None)
    return Row(metric, better, cells, Cell(" / ".join(told), _share(metric, known)))


def shown(metric: str, value: Number) -> str:
    """Format a metric as tools/evaluate.py prints it, but large numbers with one decimal."""
    text = show_metric(metric, value)
    return f"{value:.1f}" if value is not None and abs(value) >= 100 and text == f"{value:.4f}" else text


def _better(metric: str) -> str:
    last = metric.rpartition("/")[2]
    if _NEUTRAL.search(last):
        return ""
    return "lower" if _LOWER.search(last) else "higher"


def _share(metric: str, value: Number) -> float | None:
    """Return a value in percent if the metric is a share of the samples."""
    if value is None or not show_metric(metric, value).endswith("%"):
        return None
    return round(100 * min(max(value, 0.0), 1.0), 1)
