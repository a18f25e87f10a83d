"""Measure everything on one GPU in less than nine minutes: tests, kernels, steps, memory, data, sampling.

    python benchmarks/gpu_report.py                              # make gpu-report
    python benchmarks/gpu_report.py --parts VTP-L,sampling
    python benchmarks/gpu_report.py --rehearse --out /tmp/report # tiny models, on any machine

Nothing is fetched. Each part is a process with a time limit, and also has the time that earlier ones left. What is
measured is written at once to OUT/DEVICE-DATE.jsonl and .md, so that a part that crashes or is stopped loses nothing of
what it has done. The page names every figure that is missing, and why.
"""

import argparse
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from benchmarks.gpu.page import page  # noqa: E402
from benchmarks.gpu.parts import BUDGET, MEASURE, Part, all_parts  # noqa: E402
from benchmarks.gpu.supervise import supervise  # noqa: E402
from megavtp.cli import run  # noqa: E402
from megavtp.data.files import write_atomic  # noqa: E402
from megavtp.errors import UserError  # noqa: E402
from megavtp.options import Options, new_folder  # noqa: E402

_MACHINE_LIMIT = 240.0  # seconds for the first import of torch, from a cold disk


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=new_folder, default=results, help="folder of the two files (benchmarks/results)")
    parser.add_argument("--parts", help="those to run, as named in the page, with commas between them (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="run the whole flow with tiny models, also on a CPU")
    return parser.parse_args()


def main() -> int:
    start, options = time.monotonic(), parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as by `timeout`: the part that runs has to end, too
    parts = chosen(all_parts(options.rehearse), options.parts)
    machine = facts_of_machine()
    if machine["device"] == "CPU" and not options.rehearse:
        raise UserError(
            "no GPU: torch finds no CUDA device on this machine; run the report where there is one, or its flow on "
            "tiny models with --rehearse"
        )
    machine |= {"date": time.strftime("%Y-%m-%d"), "rehearsal": options.rehearse, "command": shlex.join(sys.argv)}
    budget = sum(part.limit for part in parts) if options.rehearse else BUDGET - (time.monotonic() - start)
    report = Report(options.out, parts, machine)
    failed = report.fill(budget)
    print(f"{report.page_file}: " + (f"not whole: {', '.join(failed)}" if failed else "all parts finished"))
    return 1 if failed else 0


def chosen(parts: list[Part], names: str | None) -> list[Part]:
    if names is None:
        return parts
    known = {part.name: part for part in parts}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"--parts {name}: there is no such part; choose from {', '.join(known)}")
    return [part for part in parts if part.name in wanted]


def shortened(limits: Sequence[float], budget: float) -> list[float]:
    """Return the limits of all parts within a budget, for which the last ones give way: the first measure what the
    others are compared with."""
    kept = []
    for limit in limits:
        kept.append(min(limit, budget))
        budget -= kept[-1]
    return kept


def facts_of_machine() -> dict[str, Any]:
    """Return what a process of its own finds out: this one does not touch the device."""
    told: list[Mapping[str, Any]] = []
    end = supervise([sys.executable, str(MEASURE), "machine"], _MACHINE_LIMIT, told.append)
    if not told or "missing" in told[0]:
        raise UserError(f"the machine cannot be described: {told[0]['missing'] if told else end.why}")
    return dict(told[0])


class Report:
    """The two files of a report, which are complete for all that is known at any time."""

    def __init__(self, folder: Path, parts: Sequence[Part], machine: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^a-z0-9]+", "-", f"{machine['device']} {machine['date']}".lower()).strip("-")
        if machine["rehearsal"]:
            stem += "-rehearsal"
        self.parts, self.records = parts, [machine]
        self.page_file, self.lines_file = folder / f"{stem}.md", folder / f"{stem}.jsonl"
        self.lines_file.write_text("")  # a report of the same day is replaced
        self._write(machine)

    def fill(self, budget: float) -> list[str]:
        """Run all parts within ``budget`` seconds; return the names of those that did not finish."""
        deadline, failed = time.monotonic() + budget, []
        limits = shortened([part.limit for part in self.parts], budget)
        for number, part in enumerate(self.parts):
            part = replace(part, limit=max(1.0, deadline - time.monotonic() - sum(limits[number + 1 :])))
            print(f"{part.name}, at most {part.limit:.0f} s ...", flush=True)
            end = supervise(part.command, part.limit, lambda result, name=part.name: self.add({"part": name, **result}))
            self.add({
                "part": part.name, "seconds": round(end.seconds, 1), "why": end.why,
                **({"last_lines": end.last_lines} if end.why else {}),
            })
            if end.why:
                failed.append(part.name)
                print(f"  did not finish: {end.why}", flush=True)
        return failed

    def add(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        self._write(record)
        if "missing" in record:
            print(f"  {record['case']}: missing, {record['missing']}", flush=True)
        elif "case" in record and "seconds" in record:
            print(f"  {record['case']}", flush=True)

    def _write(self, record: Mapping[str, Any]) -> None:
        with open(self.lines_file, "a") as file:
            file.write(json.dumps(record) + "\n")
        write_atomic(self.page_file, page(self.parts, self.records).encode())


if __name__ == "__main__":
    run(main)
