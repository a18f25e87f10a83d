"""The progress line of a run, live on a terminal and line by line in a file."""

import resource
import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import torch

_QUIET = ("kind", "step", "time")


class ProgressLine:
    """Prints records: on a terminal the step line is overwritten in place, elsewhere each is a line of its own."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._open = False  # whether the cursor stands behind a line that may be overwritten

    def update(self, record: Mapping[str, Any], total_steps: int) -> None:
        line = step_text(record, total_steps)
        if self._live:
            width = shutil.get_terminal_size().columns
            self._write("\r\x1b[K" + line[: width - 1])
            self._open = True
        else:
            self._write(line + "\n")

    def note(self, record: Mapping[str, Any]) -> None:
        """Print an event on a line of its own, which stays."""
        fields = " ".join(f"{key}={_short(value)}" for key, value in record.items() if key not in _QUIET)
        self.close()
        self._write(f"step {record['step']}: {record['kind']} {fields}".rstrip() + "\n")

    def close(self) -> None:
        """Leave the live line as it stands and go to the next."""
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def step_text(record: Mapping[str, Any], total_steps: int) -> str:
    """Format a step record in one line, the most important first, as a narrow terminal cuts the end off."""
    terms = " ".join(f"{_term(name)} {value:.4g}" for name, value in record["terms"].items())
    speed = f"{record['images_per_second']:,.4g} img/s, data wait {record['data_wait']:.0%}"
    if record["mfu"] is not None:
        speed += f", MFU {record['mfu']:.1%}"
    fields = [
        f"step {record['step']}/{total_steps}", f"ETA {duration(record['eta_seconds'])}", terms, speed,
        f"grad {record['grad_norm']:.3g}, lr {record['lr']:.3g}", f"{record['memory_gib']:.1f} GiB",
    ]
    if record["nonfinite_steps"]:
        fields.append(f"{record['nonfinite_steps']} non-finite")
    return " | ".join(filter(None, fields))


def duration(seconds: float) -> str:
    """Format seconds as 12:34, 1:23:45 or 2d 03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process has had: of tensors on a CUDA device, or else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _term(name: str) -> str:
    objective, _, term = name.rpartition("/")
    return objective if term == "loss" and objective else term


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."
