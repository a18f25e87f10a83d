"""Trackers show the metrics of rank 0 besides metrics.jsonl: Weights & Biases and TensorBoard, if asked for."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megavtp.config.load import to_dict
from megavtp.config.run import LoggingConfig, RunConfig
from megavtp.data.files import write_atomic
from megavtp.errors import UserError
from megavtp.training.output_dir import writing

_RUN_ID = "wandb_run_id"  # this file in the output folder lets a resumed run go on in the same chart


def check_trackers(config: LoggingConfig) -> None:
    """Raise UserError if a configured tracker is not installed; every rank calls it, so that all stop together."""
    for name, setting, off in (
        ("wandb", config.wandb, "disabled"), ("tensorboard", str(config.tensorboard).lower(), "false"),
    ):
        if setting != off and importlib.util.find_spec(name) is None:
            raise UserError(
                f"telemetry.{name}={setting} needs the package {name}: pip install {name}, or set "
                f"telemetry.{name}={off}"
            )


class WandbTracker:
    """One wandb run; its id is kept in ``output_dir`` and taken up again when the run is resumed."""

    def __init__(self, config: RunConfig, start_step: int):
        import wandb

        self._wandb, settings, output_dir = wandb, config.telemetry, Path(config.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        id_file = output_dir / _RUN_ID
        known = id_file.read_text().strip() if start_step > 0 and id_file.exists() else None
        try:
            self._run = wandb.init(
                project=settings.wandb_project, mode=settings.wandb, dir=str(output_dir), config=to_dict(config),
                id=known, resume="allow" if known else None,
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb: {error}; log in with `wandb login`, or set telemetry.wandb=offline") from error
        with writing(id_file):
            write_atomic(id_file, self._run.id.encode())
        # The step axis is our own: wandb's must only grow, but a resumed run repeats the steps since its checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """Event files in ``output_dir/tensorboard``; steps that a resumed run repeats replace the old ones."""

    def __init__(self, output_dir: Path, start_step: int):
        self._folder = output_dir / "tensorboard"
        self._open(start_step + 1)

    def _open(self, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=first)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        with self._writing(step):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        with self._writing(step):
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._folder.is_dir():
            self._writer.close()

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Write to a new file if the folder was deleted, as the old writer would fail."""
        with writing(self._folder):
            if not self._folder.is_dir():
                self._open(step)
            yield


Tracker = WandbTracker | TensorBoardTracker


def open_trackers(config: RunConfig, start_step: int) -> list[Tracker]:
    """Open the configured trackers of a run that starts after ``start_step`` steps."""
    trackers: list[Tracker] = []
    if config.telemetry.wandb != "disabled":
        trackers.append(WandbTracker(config, start_step))
    if config.telemetry.tensorboard:
        trackers.append(TensorBoardTracker(Path(config.output_dir), start_step))
    return trackers
