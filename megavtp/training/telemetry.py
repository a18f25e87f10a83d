"""A run's telemetry: loss terms, throughput, MFU, events. It reads the device once in ``telemetry.log_every`` steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megavtp.config.load import to_dict
from megavtp.config.run import LoggingConfig, RunConfig
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh
from megavtp.planning.devices import device_peak_tflops
from megavtp.training.metrics_file import MetricsFile
from megavtp.training.progress import ProgressLine, peak_memory_gib
from megavtp.training.sinks import MetricsSink, check_sinks, open_sinks

METRICS_FILE = "metrics.jsonl"
_NORM = "grad_norm/"  # prefix that sets a tower's gradient norm apart from the terms
_SPEED_MEMORY = 0.7  # weight of the past in the pace behind the ETA


class Telemetry:
    """Collects a run's numbers; rank 0 prints them and appends them to ``output_dir/metrics.jsonl``.

    Every rank constructs one and calls ``start``, ``step`` and ``close``. A line counts steps that are done: the line
    of step 20 describes the 20th update and the ones before it back to the previous line.

    Args:
        total_steps: steps of the whole run; the last one is always logged.
        images_per_step: image-text pairs in the global batch.
        flops_per_step: model FLOPs of a step over all devices; None = no MFU.
        peak_tflops: peak of all devices together; None = no MFU.
        reduce: takes the mean of a float32 vector over data-parallel ranks; every rank calls it once per line.
        ranks: how many ranks that mean is over.
        make_sinks: opens further receivers for a start step; only rank 0 calls it.
        keep_folder: makes ``output_dir`` anew if it was deleted; rank 0 calls it before it writes a record.
    """

    def __init__(
        self, config: LoggingConfig, output_dir: Path, *, is_main: bool, total_steps: int, images_per_step: int,
        flops_per_step: float | None = None, peak_tflops: float | None = None, device: torch.device | None = None,
        reduce: Callable[[Tensor], Tensor] = lambda x: x, ranks: int = 1,
        make_sinks: Callable[[int], list[MetricsSink]] = lambda step: [],
        keep_folder: Callable[[], None] = lambda: None,
    ):
        self._config = config
        self._output_dir = Path(output_dir)
        self._is_main = is_main
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._flops_per_step = flops_per_step
        self._peak_tflops = peak_tflops
        self._device = torch.device("cpu") if device is None else device
        self._reduce, self._ranks = reduce, ranks
        self._make_sinks, self._keep_folder = make_sinks, keep_folder
        self._names: list[str] = []
        self._steps: list[list[Tensor]] = []  # terms of the steps since the last line, on the device
        self._norms: list[Tensor | float] = []
        self._file: MetricsFile | None = None
        self._sinks: list[MetricsSink] = []
        self._before_start: list[dict[str, Any]] = []
        self._progress = ProgressLine()
        self._seconds_per_step: float | None = None
        self._paused = 0.0
        self._waited = 0.0
        self._replaced = 0

    @classmethod
    def of_run(
        cls, config: RunConfig, mesh: Mesh, flops: float, keep_folder: Callable[[], None] = lambda: None
    ) -> Telemetry:
        """Make the telemetry of a run of ``flops`` model FLOPs per step. UserError if a sink is not installed."""
        settings = config.telemetry
        check_sinks(settings)
        device, known_peak = torch.device("cpu"), None
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            known_peak = device_peak_tflops(torch.cuda.get_device_name(device), config.parallel.precision)
        peak = settings.peak_tflops or known_peak
        output_dir = Path(config.output_dir)
        return cls(
            settings, output_dir, is_main=mesh.rank == 0, total_steps=config.train.steps,
            images_per_step=config.train.batch_size, flops_per_step=flops,
            peak_tflops=peak * mesh.world_size if peak else None, device=device,
            reduce=lambda x: all_reduce(x, mesh, "dp") / mesh.dp, ranks=mesh.dp,
            make_sinks=lambda start: open_sinks(settings, output_dir, start, to_dict(config)), keep_folder=keep_folder,
        )

    def start(self, step: int) -> None:
        """Begin after ``step`` done steps: lines of later steps, which will be done again, are dropped."""
        if self._is_main:
            self._sinks = self._make_sinks(step)  # first, as it may refuse, and then nothing is dropped
            self._file = MetricsFile(self._output_dir / METRICS_FILE, step)
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
            terms: detached scalars on the device, with the same names in every step and on every rank; they must not
                change afterwards.
            wait_seconds: time spent waiting for data since the start.
            tower_norms: gradient norm of each tower, equal on all ranks.
            bad_samples: how many different samples this rank has replaced by others since the start.

        In a line, terms, ``grad_norm`` and ``tower_grad_norms`` are means over its steps (and over ranks), without the
        non-finite ones, whose number is ``nonfinite_steps``; ``grad_norm_max`` is the largest; ``lr`` is the last;
        ``bad_samples`` are those that were newly replaced, over all ranks.
        """
        values = {**terms, **{_NORM + tower: norm for tower, norm in tower_norms.items()}}
        self._names = self._names or list(values)
        assert self._names == list(values), "the loss terms changed during the run"
        self._steps.append(list(values.values()))
        self._norms.append(grad_norm)
        done = step + 1
        if done % self._config.log_every == 0 or done == self._total_steps:
            self._line(done, lr, wait_seconds, bad_samples)

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        """Record something that happened after ``step`` done steps; numbers among ``fields`` go to the sinks too."""
        if not self._is_main:
            return
        record = {"kind": kind, "step": step, "time": time.time(), **fields}
        if self._file is None:
            self._before_start.append(record)
        else:
            self._emit(record)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send the sinks a picture that was saved at ``path``."""
        for sink in self._sinks:
            sink.picture(step, name, path)
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
        """End the progress line, the file and the sinks."""
        self._progress.close()
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, done: int, lr: float, wait_seconds: float, bad_samples: int) -> None:
        rows, norms, wait, replaced = self._read(wait_seconds - self._waited, bad_samples - self._replaced)
        now = time.perf_counter()  # after the read, which waited for the device
        elapsed = max(now - self._since - self._paused, 1e-9)
        steps = len(rows)
        pace = elapsed / steps
        past = pace if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = _SPEED_MEMORY * past + (1 - _SPEED_MEMORY) * pace
        self._since, self._paused, self._waited, self._replaced = now, 0.0, wait_seconds, bad_samples
        if not self._is_main:
            return
        finite_norms = [norm for norm in norms if math.isfinite(norm)]
        mfu = None
        if self._flops_per_step and self._peak_tflops:
            mfu = self._flops_per_step / pace / (self._peak_tflops * 1e12)
        means = {name: _mean(column) for name, column in zip(self._names, zip(*rows))}
        self._emit({
            "kind": "step", "step": done, "time": time.time(),
            "terms": {name: value for name, value in means.items() if not name.startswith(_NORM)},
            "tower_grad_norms": {
                name.removeprefix(_NORM): value for name, value in means.items() if name.startswith(_NORM)
            },
            "grad_norm": _mean(norms), "grad_norm_max": max(finite_norms, default=math.nan), "lr": lr,
            "nonfinite_steps": sum(not all(map(math.isfinite, (*row, norm))) for row, norm in zip(rows, norms)),
            "bad_samples": round(replaced * self._ranks),
            "images_per_second": self._images_per_step / pace, "seconds_per_step": pace,
            "data_wait": wait / elapsed, "mfu": mfu, "memory_gib": peak_memory_gib(self._device),
            "eta_seconds": (self._total_steps - done) * self._seconds_per_step,
        })

    def _read(self, wait: float, replaced: int) -> tuple[list[list[float]], list[float], float, float]:
        """Return rows of terms by step, gradient norms, seconds waited and samples replaced, all means over ranks, in
        one transfer.

        Norms that are numbers already are the same on every rank and stay as they are.
        """
        steps, width = len(self._steps), len(self._names)
        scalars = [value for row in self._steps for value in row]
        scalars += [norm for norm in self._norms if isinstance(norm, Tensor)]
        vector = torch.stack([scalar.detach().reshape(()).to(self._device, torch.float32) for scalar in scalars])
        *values, wait, bad = self._reduce(torch.cat([vector, vector.new_tensor([wait, replaced])])).tolist()
        read = iter(values[steps * width :])
        norms = [next(read) if isinstance(norm, Tensor) else norm for norm in self._norms]
        self._steps, self._norms = [], []
        return [values[row * width : (row + 1) * width] for row in range(steps)], norms, wait, bad

    def _emit(self, record: dict[str, Any]) -> None:
        self._keep_folder()
        assert self._file is not None, "records come after the start, on the first rank"
        self._file.append(record)
        if record["kind"] == "step":
            self._progress.update(record, self._total_steps)
        else:
            self._progress.note(record)
        numbers = _numbers(record)
        for sink in self._sinks if numbers else ():
            sink.numbers(record["step"], numbers)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record: terms by their own name, the rest under its kind."""
    prefix = "train" if record["kind"] == "step" else record["kind"]
    flat = dict(record.get("terms") or {}) if record["kind"] == "step" else {}
    flat |= {f"{prefix}/{key}": value for key, value in record.items() if key not in ("step", "time", "terms")}
    flat |= {f"{prefix}/{_NORM}{tower}": value for tower, value in (record.get("tower_grad_norms") or {}).items()}
    return {
        key: float(value) for key, value in flat.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
