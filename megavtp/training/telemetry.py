"""A run's telemetry: loss terms, throughput, MFU, events. It reads the device once in ``telemetry.log_every`` steps."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megavtp.config.run import RunConfig
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh
from megavtp.planning.devices import device_peak_tflops
from megavtp.training.metrics_file import MetricsFile
from megavtp.training.progress import ProgressLine, peak_memory_gib
from megavtp.training.trackers import Tracker, open_trackers

METRICS_FILE = "metrics.jsonl"
_NORM = "grad_norm"  # among the terms of a step: the norm of its gradient, and with a tower's name that tower's
_OF_TOWER = f"{_NORM}/"
_SPEED_MEMORY = 0.7  # weight of the past in the pace behind the ETA


class Telemetry:
    """Collects a run's numbers; rank 0 prints them and appends them to ``output_dir/metrics.jsonl``.

    Every rank constructs one and calls ``start``, ``step`` and ``close``. A line counts steps that are done: the line
    of step 20 describes the 20th update and the ones before it back to the previous line.

    Args:
        flops: model FLOPs of a step over all devices.
        keep_folder: makes ``output_dir`` anew if it was deleted; rank 0 calls it before it writes a record.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, flops: float, keep_folder: Callable[[], None] = lambda: None):
        self.config, self.mesh, self.is_main = config, mesh, mesh.rank == 0
        self.device, known_peak = torch.device("cpu"), None
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
            known_peak = device_peak_tflops(torch.cuda.get_device_name(self.device), config.parallel.precision)
        peak = config.telemetry.peak_tflops or known_peak
        self._flops, self._peak_flops = flops, peak * mesh.world_size * 1e12 if peak else None  # the peak is per second
        self._keep_folder = keep_folder
        self._names: list[str] = []
        self._rows: list[list[Tensor | float]] = []  # one value of each name by step since the last line, on the device
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        self._before_start: list[dict[str, Any]] = []
        self.progress = ProgressLine()
        self._seconds_per_step: float | None = None
        self._paused = self._waited = 0.0

    def start(self, step: int) -> None:
        """Begin after ``step`` done steps: lines of later steps, which will be done again, are dropped."""
        if self.is_main:
            self._trackers = open_trackers(self.config, step)  # first, as it may refuse, and then nothing is dropped
            self._file = MetricsFile(Path(self.config.output_dir) / METRICS_FILE, step)
            for record in self._before_start:
                self._emit(record)
            self._before_start.clear()
        self._since = time.perf_counter()

    def step(
        self, step: int, terms: Mapping[str, Tensor], grad_norm: Tensor | float, lr: float, wait_seconds: float,
        tower_norms: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Note one step; write a line after every ``log_every``-th and the last. The device is not read in between.

        Args:
            step: index of the step, from 0.
            terms: detached scalars on the device, with the same names in every step and on every rank; they must not
                change afterwards.
            wait_seconds: time spent waiting for data since the start.
            tower_norms: gradient norm of each tower, equal on all ranks.

        In a line, terms, ``grad_norm`` and ``tower_grad_norms`` are means over its steps (and over ranks), without the
        non-finite ones, whose number is ``nonfinite_steps``; ``grad_norm_max`` is the largest; ``lr`` is the last.
        """
        values = {**terms, **{_OF_TOWER + tower: norm for tower, norm in tower_norms.items()}, _NORM: grad_norm}
        self._names = self._names or list(values)
        assert self._names == list(values), "the loss terms changed during the run"
        self._rows.append(list(values.values()))
        done = step + 1
        if done % self.config.telemetry.log_every == 0 or done == self.config.train.steps:
            self._line(done, lr, wait_seconds)

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        """Record something that happened after ``step`` done steps; numbers among ``fields`` go to the trackers too."""
        if not self.is_main:
            return
        record = {"kind": kind, "step": step, "time": time.time(), **fields}
        if self._file is None:
            self._before_start.append(record)
        else:
            self._emit(record)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send the trackers a picture that was saved at ``path``."""
        for tracker in self._trackers:
            tracker.picture(step, name, path)
        self.event("picture", step=step, name=name, path=str(path))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time in here (evaluation, pictures) as training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def close(self) -> None:
        self.progress.close()
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, done: int, lr: float, wait_seconds: float) -> None:
        rows, wait = self._read(wait_seconds - self._waited)
        now = time.perf_counter()  # after the read, which waited for the device
        elapsed = max(now - self._since - self._paused, 1e-9)
        pace = elapsed / len(rows)
        past = pace if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = _SPEED_MEMORY * past + (1 - _SPEED_MEMORY) * pace
        self._since, self._paused, self._waited = now, 0.0, wait_seconds
        if not self.is_main:
            return
        columns = {name: list(filter(math.isfinite, column)) for name, column in zip(self._names, zip(*rows))}
        means = {name: sum(values) / len(values) if values else math.nan for name, values in columns.items()}
        norms = {name.removeprefix(_OF_TOWER): mean for name, mean in means.items() if name.startswith(_OF_TOWER)}
        self._emit({
            "kind": "step", "step": done, "time": time.time(),
            "terms": {name: mean for name, mean in means.items() if not name.startswith(_NORM)},
            "tower_grad_norms": norms,
            "grad_norm": means[_NORM], "grad_norm_max": max(columns[_NORM], default=math.nan), "lr": lr,
            "nonfinite_steps": sum(not all(map(math.isfinite, row)) for row in rows),
            "images_per_second": self.config.train.batch_size / pace, "seconds_per_step": pace,
            "data_wait": wait / elapsed,
            "mfu": self._flops / pace / self._peak_flops if self._flops and self._peak_flops else None,
            "memory_gib": peak_memory_gib(self.device),
            "eta_seconds": (self.config.train.steps - done) * self._seconds_per_step,
        })

    def _read(self, wait: float) -> tuple[list[list[float]], float]:
        """Return the rows of values by step and the seconds waited, all means over ranks, in one transfer.

        Norms that are numbers already are the same on every rank and stay as they are.
        """
        scalars = [value for row in self._rows for value in row if isinstance(value, Tensor)]
        vector = torch.stack([scalar.detach().reshape(()).to(self.device, torch.float32) for scalar in scalars])
        vector = torch.cat([vector, vector.new_tensor([wait])])
        *values, wait = (all_reduce(vector, self.mesh, "dp") / self.mesh.dp).tolist()
        read = iter(values)
        rows = [[next(read) if isinstance(value, Tensor) else value for value in row] for row in self._rows]
        self._rows = []
        return rows, wait

    def _emit(self, record: dict[str, Any]) -> None:
        self._keep_folder()
        assert self._file is not None, "records come after the start, on the first rank"
        self._file.append(record)
        if record["kind"] == "step":
            self.progress.update(record, self.config.train.steps)
        else:
            self.progress.note(record)
        numbers = _numbers(record)
        for tracker in self._trackers if numbers else ():
            tracker.numbers(record["step"], numbers)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record: terms by their own name, the rest under its kind."""
    prefix = "train" if record["kind"] == "step" else record["kind"]
    flat = dict(record.get("terms") or {}) if record["kind"] == "step" else {}
    flat |= {f"{prefix}/{key}": value for key, value in record.items() if key not in ("step", "time", "terms")}
    flat |= {f"{prefix}/{_OF_TOWER}{tower}": value for tower, value in (record.get("tower_grad_norms") or {}).items()}
    return {
        key: float(value) for key, value in flat.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
