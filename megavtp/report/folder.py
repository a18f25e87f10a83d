"""A run's output folder, read with suspicion: what is damaged is left out, and a line says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megavtp.config.load import read_yaml
from megavtp.errors import UserError
from megavtp.json_file import Count, Finite, check_form, foreign_form
from megavtp.training.metrics_file import read_metrics
from megavtp.training.state import flat
from megavtp.training.telemetry import METRICS_FILE

Kind = Literal["pretrain", "decoder", "dit"]
KINDS: dict[Kind, str] = {"pretrain": "Joint training", "decoder": "Decoder", "dit": "Diffusion transformer"}
CONFIG_FILE = "config.yaml"
_REMEDY = "restore it, or leave it away"
Number = Finite | None


@foreign_form
class StepLine:
    """A line of metrics.jsonl about training steps; telemetry.py says what its fields are."""

    step: Count
    terms: dict[str, Number] = field(default_factory=dict)
    tower_grad_norms: dict[str, Number] = field(default_factory=dict)
    grad_norm: Number = None
    grad_norm_max: Number = None
    lr: Number = None
    nonfinite_steps: Count = 0
    bad_samples: Count = 0
    images_per_second: Number = None
    seconds_per_step: Number = None
    data_wait: Number = None
    mfu: Number = None
    memory_gib: Number = None


@dataclass(frozen=True)
class Run:
    """A run as its folder records it.

    Attributes:
        label: the shortest end of the path that tells the runs of a page apart.
        config: the configuration as nested mappings.
        settings: the same with dotted keys.
        steps, events: the lines of metrics.jsonl, in its order.
        left_out: a line for each thing in the folder that could not be read.
    """

    path: Path
    label: str
    kind: Kind
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    steps: Sequence[StepLine]
    events: Sequence[Mapping[str, Any]]
    left_out: list[str]

    def events_of(self, kind: str) -> list[Mapping[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def done(self) -> int:
        """The number of steps that are done, as far as the folder tells."""
        return max([line.step for line in self.steps] + [event["step"] for event in self.events], default=0)

    @property
    def total(self) -> int | None:
        """The number of steps that the configuration asks for."""
        value = self.settings.get("train.steps")
        return value if isinstance(value, int) else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the folders of runs.

    Raises:
        UserError: a folder is missing, is named twice, or is no run's.
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved):
        if resolved.count(place) > 1:
            raise UserError(f"{path} is named more than once; name each run once")
    return [read_run(path, label) for path, label in zip(paths, _labels(resolved))]


def read_run(path: Path, label: str) -> Run:
    """Read one run's folder. UserError: it is none."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder; name the output folder of a run, such as runs/demo")
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path} holds no {CONFIG_FILE}, which every run writes; name the output folder of a run")
    config = read_yaml(path / CONFIG_FILE)
    kind = _kind(config)
    if kind is None:
        raise UserError(f"{path / CONFIG_FILE} is not a run's: it has no steps to train; name a run's output folder")
    steps, events, left_out = _read_lines(path / METRICS_FILE)
    return Run(path, label, kind, config, flat(config), steps, events, left_out)


def _kind(config: Mapping[str, Any]) -> Kind | None:
    """Tell by the sections of a configuration which launcher ran it."""
    settings = flat(config)
    if "train.steps" not in settings:
        return None
    if any(key.startswith("flow_matching.") for key in settings):
        return "dit"
    if not any(key.startswith("objectives.") for key in settings):
        return None
    return "decoder" if settings.get("objectives.reconstruction.frozen_encoder") is True else "pretrain"


def _read_lines(path: Path) -> tuple[list[StepLine], list[dict[str, Any]], list[str]]:
    steps, events, damaged = [], [], 0
    try:
        for record in read_metrics(path):
            try:
                if not isinstance(record.get("kind"), str):
                    damaged += 1
                elif record["kind"] == "step":
                    steps.append(check_form(record, StepLine, str(path), _REMEDY))
                else:
                    events.append(record)
            except UserError:
                damaged += 1
    except OSError as error:
        return steps, events, [f"{path} cannot be read ({error.strerror})"]
    told = []
    if damaged:
        told.append(f"{path}: {damaged} line{'s are' if damaged > 1 else ' is'} damaged and left out")
    if not path.exists():
        told.append(f"{path} is missing: the run has not begun to train, or the file was moved away")
    return steps, events, told


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    parts = [path.parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels
