"""The Markdown page of a report, made anew from all records whenever one is added."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.parts import Column, Part, Rates, Row

Record = Mapping[str, Any]


def page(parts: Sequence[Part], records: Sequence[Record]) -> str:
    """Return the page. The first record is of the machine; the others are of a part, those without a case its end."""
    machine = records[0]
    facts = {key: machine[key] for key in ("date", "device", "cores", "memory_gib", "device_memory_gib")}
    versions = ", ".join(f"{name} {text}" for name, text in machine["versions"].items() if text)
    lines = [
        f"# {machine['device']}, {machine['date']}" + (" (rehearsal)" if machine["rehearsal"] else ""), "",
        "A rehearsal on tiny models: its figures say nothing about speed." if machine["rehearsal"] else
        "Every figure is of one run on one device; `-` is what could not be known.", "",
        f"Made by `{machine['command']}`. Machine: {facts['device']}"
        + (f" with {facts['device_memory_gib']:.0f} GiB" if facts["device_memory_gib"] else "")
        + f", {facts['cores']} CPU cores, {facts['memory_gib']:.0f} GiB of memory. Versions: {versions}.",
    ]
    rates = _rates(records)
    for part in parts:
        own = [record for record in records if record.get("part") == part.name]
        lines += ["", f"## {part.name}", "", part.note, "", *_body(part, own, rates)]
    return "\n".join(lines) + "\n"


def _rates(records: Sequence[Record]) -> Rates:
    kinds = ("flops", "bytes")
    return {kind: r[f"{kind}_per_second"] for r in records for kind in kinds if f"{kind}_per_second" in r}


def _body(part: Part, records: Sequence[Record], rates: Rates) -> list[str]:
    rows: dict[str, Row] = {}
    for record in records:
        if "case" in record:
            rows.setdefault(record["case"], {}).update(record)
    end = next((record for record in records if "case" not in record), None)
    reason = "not begun" if end is None else end["why"] or "it was not told of"
    named = list(dict.fromkeys([*part.cases, *rows]))
    columns = [c for c in part.columns if any(_cell(c, row, rates) != "-" for row in rows.values())]
    lines = []
    if columns:
        lines += [f"| {' | '.join(['case', *(c.title for c in columns)])} |", "|" + " --- |" * (len(columns) + 1)]
        for case in named:
            cells = [_cell(column, rows.get(case, {}), rates) for column in columns]
            if set(cells) != {"-"}:  # one that ran out of memory still has what was planned
                lines.append(f"| {' | '.join([case, *cells])} |")
        lines.append("")
    for case in named:
        row = rows.get(case, {})
        if "seconds" not in row:
            lines.append(f"- {case}: missing, {row.get('missing', reason)}")
    if end is None:
        told = "This part has not begun." if not rows else "This part is under way."
    elif end["why"]:
        told = f"This part did not finish: {end['why']}."
    else:
        told = f"This part took {end['seconds']:.0f} s."
    return [*lines, *([""] if lines and lines[-1] else []), told]


def _cell(column: Column, row: Row, rates: Rates) -> str:
    try:
        return column.show(row, rates)
    except (KeyError, TypeError):  # a figure is not there, or is None
        return "-"
