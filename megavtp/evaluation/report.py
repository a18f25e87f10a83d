"""Metrics are written for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavtp.data.files import write_atomic
from megavtp.errors import UserError

CHANCE = "chance/"
_NUMBERS = ("reconstruction/", "generation/")  # all others are shares of the samples, shown in percent


def format_table(metrics: Mapping[str, float], compare: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Format a plain-text table: a line per metric with its value, a column for each of ``compare``, and chance."""
    compare = dict(compare or {})
    rows = [["metric", "value", *compare, "chance"]]
    for name in metrics:
        if not name.startswith(CHANCE):
            values = [*(source.get(name) for source in (metrics, *compare.values())), metrics.get(CHANCE + name)]
            rows.append([name, *(show_metric(name, value) for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def show_metric(name: str, value: float | None) -> str:
    """Format one metric: PSNR in dB, distances as numbers, shares in percent; "" for None."""
    if value is None:
        return ""
    if name.endswith("samples"):
        return str(int(value))
    if name.endswith("psnr"):
        return f"{value:.2f} dB"
    return f"{value:.4f}" if name.startswith(_NUMBERS) else f"{100 * value:.1f} %"


def write_metrics(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write nested metrics as JSON; a value that is not finite becomes null."""
    write_file(path, json.dumps(_finite(content), indent=2).encode() + b"\n")


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file that the user named, make its folder, and rename it into place. Raises ``UserError``."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or name another file") from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
