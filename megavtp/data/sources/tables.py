"""Tables of image paths and captions: CSV, TSV and JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megavtp.data.files import refuse_remote
from megavtp.errors import UserError

_PATH_COLUMNS = ("image", "path", "filepath", "file_path", "file", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "text", "title")
_LABEL_COLUMNS = ("label", "class")


@dataclass(frozen=True)
class Entry:
    """An image file, its caption ("" = none) and the name of its class ("" = none)."""

    path: Path
    caption: str
    label: str = ""


def read_table(path: Path) -> Iterator[Entry]:
    """The rows of a .csv, .tsv or .jsonl file with an image column (image, path, filepath, ...), a caption column
    (caption, text, title) and perhaps a class column (label, class).

    Relative image paths start at the table's folder. Raises ``UserError`` for other files, missing columns, and image
    paths that are pipes or URLs.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise UserError(f"{path} is neither a folder nor a .csv, .tsv or .jsonl file; rename or convert it")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _json_rows(file, path) if suffix in (".jsonl", ".ndjson") else _csv_rows(file, suffix)
            yield from _entries(rows, path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable as text ({error}); save it as UTF-8") from None


def _csv_rows(file: TextIO, suffix: str) -> Iterable[dict[str, Any]]:
    header = file.readline()
    file.seek(0)
    # Tables for other CLIP trainers often are tab-separated and called .csv.
    tabs = suffix == ".tsv" or ("\t" in header and "," not in header)
    return csv.DictReader(file, delimiter="\t" if tabs else ",")


def _json_rows(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; write one per line")
        yield row


def _entries(rows: Iterable[dict[str, Any]], path: Path) -> Iterator[Entry]:
    for row in rows:
        columns = {str(name).strip().lower(): name for name in row}
        image = _pick(row, columns, _PATH_COLUMNS)
        caption = _pick(row, columns, _CAPTION_COLUMNS)
        if image is None or caption is None:
            missing = _PATH_COLUMNS if image is None else _CAPTION_COLUMNS
            raise UserError(f"{path}: no column of {', '.join(missing)} (it has {', '.join(columns)}); rename one")
        if image:
            yield Entry(path.parent / refuse_remote(image), caption, _pick(row, columns, _LABEL_COLUMNS) or "")


def _pick(row: dict[str, Any], columns: dict[str, str], wanted: tuple[str, ...]) -> str | None:
    """The first wanted column's text on one line; ``None`` if the row has no such column."""
    for name in wanted:
        if name in columns:
            value = row[columns[name]]
            return " ".join(str(value).split()) if isinstance(value, str | int) else ""
    return None
