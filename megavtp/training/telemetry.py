"""A run's telemetry: loss terms, throughput, MFU, events. It reads the device once in ``telemetry.log_every`` steps."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megavtp.config.run import RunConfig, has_line
from megavtp.nn.compiling import COMPILED
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh
from megavtp.planning.devices import device_peak_tflops
from megavtp.training.metrics_file import MetricsFile
from megavtp.training.progress import ProgressLine, peak_memory_gib
from megavtp.training.trackers import Tracker, open_trackers
from megavtp.training.watch import Watch, Watches

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
        watches: of terms that every line has; one that is due becomes an event ``warning``.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, flops: float, keep_folder: Callable[[], None] = lambda: None,
        watches: Sequence[Watch] = (),
    ):
        self.config, self.mesh, self.is_main = config, mesh, mesh.rank == 0
        self.device, known_peak = torch.device("cpu"), None
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
            known_peak = device_peak_tflops(torch.cuda.get_device_name(self.device), config.parallel.precision)
        peak = config.telemetry.peak_tflops or known_peak
        self._flops, self._peak_flops = flops, peak * mesh.world_size * 1e12 if peak else None  # the peak is per second
        self._keep_folder = keep_folder
        self._watches = Watches(watches)
        self._rows: list[dict[str, Tensor | float]] = []  # the values by name of each step since the last line
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        self._before_start: list[dict[str, Any]] = []
        self.progress = ProgressLine()
        self._seconds_per_step: float | None = None
        self._paused = self._waited = 0.0
        self._compiled = replace(COMPILED)
        self._replaced = 0

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
        tower_norms: Mapping[str, Tensor] = MappingProxyType({}), bad_samples: int = 0,
    ) -> None:
        """Note one step; write a line after every ``log_every``-th and the last. The device is not read in between.

        Args:
            step: index of the step, from 0.
            terms: detached scalars on the device, with the same names on every rank; they must not change afterwards.
                A line has the terms of its last step, which other steps may lack.
            wait_seconds: time spent waiting for data since the start.
            tower_norms: gradient norm of each tower, equal on all ranks.
            bad_samples: how many different samples this rank has replaced by others since the start.

        In a line, terms, ``grad_norm`` and ``tower_grad_norms`` are means over its steps (and over ranks), without the
        non-finite ones, whose number is ``nonfinite_steps``; ``grad_norm_max`` is the largest; ``lr`` is the last;
        ``bad_samples`` are those that were newly replaced, over all ranks. A step that compiled is an event
        ``compiled``, and its compiling does not count as training time.
        """
        towers = {_OF_TOWER + tower: norm for tower, norm in tower_norms.items()}
        self._rows.append({**terms, **towers, _NORM: grad_norm})
        if COMPILED.graphs > self._compiled.graphs:
            self._paused += COMPILED.seconds - self._compiled.seconds
            self._compiled = replace(COMPILED)
            self.event("compiled", step=step + 1, graphs=COMPILED.graphs, seconds=COMPILED.seconds)
        if has_line(self.config, step + 1):
            self._line(step + 1, lr, wait_seconds, bad_samples)

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

    def _line(self, done: int, lr: float, wait_seconds: float, bad_samples: int) -> None:
        rows, wait, replaced = self._read(wait_seconds - self._waited, bad_samples - self._replaced)
        now = time.perf_counter()  # after the read, which waited for the device
        elapsed = max(now - self._since - self._paused, 1e-9)
        pace = elapsed / len(rows)
        past = pace if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = _SPEED_MEMORY * past + (1 - _SPEED_MEMORY) * pace
        self._since, self._paused, self._waited, self._replaced = now, 0.0, wait_seconds, bad_samples
        if not self.is_main:
            return
        columns = {name: [row[name] for row in rows if math.isfinite(row.get(name, math.nan))] for name in rows[-1]}
        means = {name: sum(values) / len(values) if values else math.nan for name, values in columns.items()}
        norms = {name.removeprefix(_OF_TOWER): mean for name, mean in means.items() if name.startswith(_OF_TOWER)}
        terms = {name: mean for name, mean in means.items() if not name.startswith(_NORM)}
        self._emit({
            "kind": "step", "step": done, "time": time.time(), "terms": terms,
            "tower_grad_norms": norms,
            "grad_norm": means[_NORM], "grad_norm_max": max(columns[_NORM], default=math.nan), "lr": lr,
            "nonfinite_steps": sum(not all(map(math.isfinite, row.values())) for row in rows),
            "bad_samples": round(replaced * self.mesh.dp),
            "images_per_second": self.config.train.batch_size / pace, "seconds_per_step": pace,
            "data_wait": wait / elapsed,
            "mfu": self._flops / pace / self._peak_flops if self._flops and self._peak_flops else None,
            "memory_gib": peak_memory_gib(self.device),
            "eta_seconds": (self.config.train.steps - done) * self._seconds_per_step,
        })
        for warning in self._watches.due(done, terms):
            self.event("warning", step=done, **warning)

    def _read(self, wait: float, replaced: int) -> tuple[list[dict[str, float]], float, float]:
        """Return the rows of values by step, the seconds waited and the samples replaced, all means over ranks, in one
        transfer.

        Norms that are numbers already are the same on every rank and stay as they are.
        """
        scalars = [value for row in self._rows for value in row.values() if isinstance(value, Tensor)]
        vector = torch.stack([scalar.detach().reshape(()).to(self.device, torch.float32) for scalar in scalars])
        vector = torch.cat([vector, vector.new_tensor([wait, replaced])])
        *values, wait, bad = (all_reduce(vector, self.mesh, "dp") / self.mesh.dp).tolist()
        read = iter(values)
        rows = [
            {name: next(read) if isinstance(value, Tensor) else value for name, value in row.items()}
            for row in self._rows
        ]
        self._rows = []
        return rows, wait, bad

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
