"""Measure one part of the report about a GPU, in this process; ``benchmarks/gpu_report.py`` starts it.

    python benchmarks/gpu/measure.py vtp-l
"""

import argparse
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone without an install

from benchmarks.gpu.supervise import MARK  # noqa: E402

# By part: the module that has it, imported when it is asked for, the function and its argument.
PARTS = {
    "machine": ("machine", "describe", ""), "tests": ("suite", "run_tests", ""), "kernels": ("kernels", "compare", ""),
    **{f"vtp-{size}": ("steps", "measure_vtp", size) for size in ("s", "b", "l")},
    **{f"plan-{size}": ("steps", "plan_vtp", size) for size in ("s", "b", "l")},  # of the part before
    "dit-xl": ("steps", "measure_dit", "xl"), "plan-dit-xl": ("steps", "plan_dit", "xl"),
    "data": ("reading", "measure_loader", ""), "sampling": ("sampling", "measure_sampling", ""),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    module, function, argument = PARTS[options.part]
    try:
        part = importlib.import_module(f"benchmarks.gpu.{module}")
        getattr(part, function)(argument, options.rehearse)
    except Exception as error:
        traceback.print_exc()
        print(reason(error), flush=True)
        os._exit(1)  # at once: the last line is what the page shows, and libraries say more when a process ends
    return 0


def tell(**result: Any) -> None:
    """Hand figures on: those of a case have its name as ``case``, and may come in several parts."""
    print("\n" + MARK + json.dumps(result), flush=True)  # on a line of its own: pytest's dots do not end theirs


def attempt(case: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Tell the figures of a case, or why there are none."""
    try:
        figures = measure()
    except Exception as error:
        if type(error).__name__ != "UserError":
            traceback.print_exc()
        figures = {"missing": reason(error)}
    tell(case=case, **figures)


def reason(error: Exception) -> str:
    """Say in one line why a figure is missing."""
    kind, first = type(error).__name__, next(iter(str(error).splitlines()), "")
    if kind in ("OutOfMemoryError", "MemoryError") or re.search("out of memory|ALLOC_FAILED", first):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed (no module {error.name})"
    if isinstance(error, ImportError):
        return f"installed, but cannot be imported: {first}"
    return first if kind == "UserError" else f"{kind}: {first}"


if __name__ == "__main__":
    # The parts import this module by its name, which is not __main__.
    sys.exit(importlib.import_module("benchmarks.gpu.measure").main())
