"""Metrics are written for people and for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavtp.data.files import write_atomic
from megavtp.errors import UserError

CHANCE = "chance/"
_NUMBERS = ("reconstruction/", "generation/", "latents/effective_rank")  # all others are shares, shown in percent


def format_table(metrics: Mapping[str, float], compare: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Format a plain-text table: a line per metric with its value, a column for each of ``compare``, and chance."""
    columns = {"value": metrics, **(compare or {})}
    rows = [["metric", *columns, "chance"]]
    for name in metrics:
        if not name.startswith(CHANCE):
            shown = [show_metric(name, column.get(name)) for column in columns.values()]
            rows.append([name, *shown, show_metric(name, metrics.get(CHANCE + name))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [[name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for name, *cells in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


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
    """Write nested metrics as JSON and rename the file into place; a value that is not finite becomes null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write_file(path, json.dumps(finite, indent=2).encode() + b"\n")


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file that the user named, make its folder, and rename it into place. Raises ``UserError``."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or name another file") from None
