"""Tables of image paths and captions: CSV, TSV and JSON lines."""

import codecs
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavtp.data.files import refuse_remote
from megavtp.data.new_sample import Skipped
from megavtp.data.sample_text import MAX_TEXT
from megavtp.errors import UserError
from megavtp.json_file import parse_json

_PATH_COLUMNS = ("image", "path", "filepath", "file_path", "file", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "text", "title")
_LABEL_COLUMNS = ("label", "class")


@dataclass(frozen=True)
class Entry:
    """An image file, its caption ("" = none) and the name of its class ("" = none)."""

    path: Path
    caption: str
    label: str = ""

    @property
    def meta(self) -> dict[str, str]:
        return {"source": self.path.name} | ({"label": self.label} if self.label else {})


def read_table(path: Path) -> Iterator[Entry | Skipped]:
    """Yield the rows of a .csv, .tsv or .jsonl file with columns of ``_PATH_COLUMNS``, ``_CAPTION_COLUMNS`` and perhaps
    ``_LABEL_COLUMNS``. Relative image paths start at the table's folder. Rows that make no sense are skipped.
    ``UserError`` for other files, missing columns, and image paths that are pipes or URLs."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise UserError(f"{path} is neither a folder nor a .csv, .tsv or .jsonl file; rename or convert it")
    for number, row in _json_rows(path) if suffix in (".jsonl", ".ndjson") else _csv_rows(path, suffix):
        found = row if isinstance(row, str) else _entry(row, path)
        yield Skipped(found, f"{path.name} line {number}") if isinstance(found, str) else found


def _csv_rows(path: Path, suffix: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield line numbers with their rows, or with the reason why a row cannot be read."""
    csv.field_size_limit(MAX_TEXT)  # a quote that is never closed makes the rest of the file one field
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            # Tables for other CLIP trainers often are tab-separated and called .csv.
            tabs = suffix == ".tsv" or ("\t" in header and "," not in header)
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",")
            columns = _columns(reader.fieldnames or ())
            for wanted in (_PATH_COLUMNS, _CAPTION_COLUMNS) if columns else ():
                if not columns.keys() & set(wanted):
                    has = f"it has {', '.join(columns)}"
                    raise UserError(f"{path}: no column of {', '.join(wanted)} ({has}); rename one")
            while True:
                row: dict[str, Any] | str
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    row = str(error)
                yield reader.reader.line_num, row  # its own is behind after an error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not readable as text ({error}); save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} is not readable as a table ({error}); save it anew") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the same as ``_csv_rows``."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    try:
                        yield number, parse_json(line, dict[str, Any], "row", "")
                    except UserError:
                        yield number, "no JSON object"
    except OSError as error:
        raise UserError(f"{path} is not readable ({error.strerror}); save it anew") from None


def _columns(names: Iterable[Any]) -> dict[str, Any]:
    return {str(name).strip().lower(): name for name in names}


def _entry(row: dict[str, Any], path: Path) -> Entry | str:
    """Return the entry, or what is wrong with the row."""
    columns = _columns(row)
    values = []
    for wanted in (_PATH_COLUMNS, _CAPTION_COLUMNS, _LABEL_COLUMNS):
        value = next((row[columns[name]] for name in wanted if name in columns), None)
        if not isinstance(value, str | int | None) or isinstance(value, bool):
            return f"{wanted[0]} is no text"
        values.append("" if value is None else " ".join(str(value).split()))
    image, caption, label = values
    return Entry(path.parent / refuse_remote(image), caption, label) if image else "no image"
