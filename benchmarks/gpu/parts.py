"""The parts of the report in their order, and the table that the page shows of each. This imports no torch."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUDGET = 535.0  # seconds of a whole report, so that all of it, with its start and end, is below nine minutes
MEASURE = Path(__file__).with_name("measure.py")
Row = dict[str, Any]  # the figures of a case by name
Rates = dict[str, float]  # what the kernels' part measured of the device: "flops" and "bytes" per second


@dataclass(frozen=True)
class Column:
    """``show(row, rates)`` gives a cell's text; what it needs may be missing, which KeyError and TypeError tell."""

    title: str
    show: Callable[[Row, Rates], str]


@dataclass(frozen=True)
class Part:
    """A part is a process of its own.

    Attributes:
        command: what runs it; it prints a line for each case (``measure.tell``).
        limit: seconds that it may take; it also gets what earlier parts have left.
        cases: the names of its cases as far as they are known before; one that is not told of is missing.
        note: what the page says under the heading.
    """

    name: str
    command: Sequence[str]
    limit: float
    cases: Sequence[str] = ()
    columns: Sequence[Column] = ()
    note: str = ""
    rehearsed: bool = field(default=True, kw_only=True)


def _number(title: str, key: str, form: str, scale: float = 1.0) -> Column:
    return Column(title, lambda row, rates: format(row[key] * scale, form))


def _share_of_limit(row: Row, rates: Rates) -> str:
    """The limit: all products at the measured rate, or all bytes at the measured one, whichever takes longer."""
    least = max(row["flops"] / rates["flops"], row["moved_bytes"] / rates["bytes"])
    return f"{least / row['seconds']:.0%}"


_STEP = (
    _number("ms a step", "seconds", ".1f", 1e3), _number("MFU", "mfu", ".1%"), Column("of the limit", _share_of_limit),
    _number("peak, GiB", "memory_gib", ".2f"),
)
_PLANNED = (
    _number("planned, GiB", "planned_gib", ".2f"),
    Column("planned to measured", lambda row, rates: f"{row['planned_gib'] / row['memory_gib']:.2f}"),
)
_TERMS = (
    "MFU counts model FLOPs against the data sheet's dense bf16 peak. The limit is the longer of the step's products "
    "at the rate that the part on kernels measured, and of the bytes that the planner counts at the measured "
    "bandwidth. "
)
# What differs from the first case, as settings over the recipe's; another one to compare is one more line. On a GPU all
# but one are compiled. ZeRO 3 is the last, because what it has cut stays in memory when it is closed.
STEP_CASES: dict[str, list[str]] = {
    "ZeRO 0": [],
    "not compiled": ["parallel.compile=none"],
    "recompute": ["parallel.recompute=full"],
    "ZeRO 1": ["parallel.zero_stage=1"],
    "ZeRO 3": ["parallel.zero_stage=3"],
}
VTP_CASES = {"ZeRO 0": [], "without LPIPS": ["objectives.reconstruction.perceptual=none"]} | STEP_CASES

VTP_BATCH = {"s": 256, "b": 256, "l": 128}  # pairs of a step on one device
DIT_BATCH = 128
KERNEL_CASES = (
    "bf16 products", "copy", "attention by crop size", "torch varlen", "FlashAttention 2", "FlashAttention 3",
    "apex RMSNorm", "apex LayerNorm", "apex AdamW",
)
SAMPLING_CASES = {"no guidance": 1.0, "guidance 3": 3.0}


def all_parts(rehearse: bool) -> list[Part]:
    """List the parts; a rehearsal has tiny models, one size of VTP, and time enough on any machine."""
    rates = (_number("TFLOP/s", "flops_per_second", ".0f", 1e-12), _number("GB/s", "bytes_per_second", ".0f", 1e-9))
    parts = [
        Part(
            "kernels", ["kernels"], 35, KERNEL_CASES, (
                _number("error", "error", ".1e"), _number("torch's error", "torch_error", ".1e"),
                Column("agrees", lambda row, rates: "yes" if row["agrees"] else "**no**"),
                _number("ms", "seconds", ".3f", 1e3), _number("torch's ms", "torch_seconds", ".3f", 1e3), *rates,
            ),
            "Errors are the largest difference from float32, or for AdamW from torch's updates, as a part of the "
            "largest value, of results and gradients. A kernel agrees if its error is at most twice that of torch's "
            "own in the same precision, or below a thousandth.",
        ),
        *(
            Part(
                f"VTP-{size.upper()}", [f"vtp-{size}"], limit, tuple(VTP_CASES),
                (_number("pairs/s", "pairs_per_second", ".1f"), *_STEP, *_PLANNED),
                f"Steps of `configs/pretrain/vtp_{size}.yaml` with {VTP_BATCH[size]} pairs on one device, a quarter of "
                "them for self-distillation, an eighth for reconstruction, bf16, always the same batch, the median of "
                "five. " + _TERMS + "LPIPS has random weights.",
                rehearsed=size == "s",
            )
            for size, limit in (("s", 80), ("b", 80), ("l", 90))
        ),
        Part(
            "DiT-XL", ["dit-xl"], 60, tuple(STEP_CASES),
            (_number("latents/s", "latents_per_second", ".1f"), *_STEP, *_PLANNED),
            f"Steps of `configs/dit/dit_xl.yaml` with {DIT_BATCH} latents on one device. " + _TERMS.strip(),
        ),
        Part(
            "data", ["data"], 55, ("VTP-S",), (
                _number("pairs/s", "images_per_second", ".1f"), _number("data wait", "data_wait", ".1%"),
                _number("MFU", "mfu", ".1%"), _number("peak, GiB", "memory_gib", ".2f"),
                _number("workers", "workers", ".0f"),
            ),
            "A run of `launchers/pretrain.py` on JPEG files of some 400 x 320 pixels, read by its loader; VTP-S, the "
            "fastest to train, asks most of it. The figures are the telemetry's last line.",
        ),
        Part(
            "sampling", ["sampling"], 35, tuple(SAMPLING_CASES),
            (_number("images/s", "images_per_second", ".2f"), _number("Euler steps", "steps", ".0f")),
            "DiT-XL in bf16 with VTP-L's decoder at 256 pixels, both with random weights.",
        ),
        Part(
            "GPU tests", ["tests"], 65, note="The tests marked `gpu`, each with what it ended with.",
            columns=(Column("outcome", lambda row, rates: row["outcome"]), _number("seconds", "seconds", ".1f")),
        ),
    ]
    extra = ["--rehearse"] if rehearse else []
    return [
        Part(
            part.name, [sys.executable, str(MEASURE), *part.command, *extra], 600 if rehearse else part.limit,
            part.cases, part.columns, part.note,
        )
        for part in parts if part.rehearsed or not rehearse
    ]
