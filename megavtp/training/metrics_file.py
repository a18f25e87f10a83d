"""metrics.jsonl has one JSON object a line, and each step once, however often a run is resumed."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavtp.data.files import write_atomic
from megavtp.data.folder_lock import leads_to
from megavtp.errors import UserError
from megavtp.json_file import parse_json
from megavtp.training.output_dir import writing


class MetricsFile:
    """Appends records to ``path``; opening it for a run that goes on after ``start_step`` drops all later records.

    A crash can tear the last line only, and the next opening drops it. A line that does not fit on the disk is removed
    again. A file that was deleted or moved away is made anew.
    """

    def __init__(self, path: Path, start_step: int):
        self.path = path
        with writing(path):
            if path.exists():
                kept = [_line(record) for record in read_metrics(path) if 0 < start_step >= record["step"]]
                write_atomic(path, b"".join(kept), flush=True)
            self._descriptor = self._open()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, which has a ``kind`` and a ``step``."""
        with writing(self.path):
            if not leads_to(self.path, self._descriptor):
                self.close()
                self._descriptor = self._open()
            self._write(_line(record))

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            while line:  # a full disk writes a part of it
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the file, if it is there, without a torn line."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(UserError):
                record = parse_json(line, dict[str, Any], str(path), "")
                if isinstance(record.get("step"), int):
                    yield record


def _line(record: Mapping[str, Any]) -> bytes:
    """Return the record as JSON: non-finite numbers become null, paths and the like their text."""
    plain = json.loads(json.dumps(record, default=str), parse_constant=lambda _: None)
    return json.dumps(plain, allow_nan=False).encode() + b"\n"
