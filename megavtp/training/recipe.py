"""The interface of a recipe: what is trained, on which data, by which passes. ``run.run`` runs one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megavtp.checkpoint.store import Checkpoint
from megavtp.config.run import ReadingConfig, RunConfig
from megavtp.data.loader import B, Loader, StepSource
from megavtp.launch.ranks import collective_limit
from megavtp.nn.compiling import compile_networks
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import build_mesh
from megavtp.parallel.passes import Pass
from megavtp.training.pictures import loss_curves
from megavtp.training.step import Pairs
from megavtp.training.telemetry import METRICS_FILE, Telemetry
from megavtp.training.watch import Watch

Hook = Callable[[int], None]


class Recipe(ABC):
    """``open`` is called first, then ``build``; all other methods may be called on a recipe that is built.

    Attributes:
        config: the validated settings; ``open`` fills in what the data decide.
        mesh, device: this rank's mesh and its device.
        engine: made by ``build``.
    """

    engine: Engine

    def __init__(self, config: RunConfig, device: torch.device):
        p = config.parallel
        self.config, self.device = config, device
        limit = collective_limit(p.timeout)
        self.mesh = build_mesh(p.tp, p.pp, p.virtual_stages, p.sequence_parallel, limit)

    @abstractmethod
    def open(self) -> None:
        """Open and read all files that the run needs, on every rank: one may be missing on a single machine.

        What every rank would list or stat is left to ``look_once``, before the rank reads anything by itself: an error
        of one rank alone must not leave the others in a collective. Raises UserError.
        """

    @abstractmethod
    def build(self) -> None:
        """Make the model, and the engine around it."""

    def compile(self, *networks: object) -> None:
        """Compile the networks' regions, as ``parallel.compile`` asks."""
        compile_networks(self.config.parallel.compile, self.device, *networks)

    @abstractmethod
    def passes(self) -> list[Pass]:
        """Return the objectives, in the order in which a step runs them."""

    @abstractmethod
    def data_digest(self) -> str:
        """Return a hash of the data set that steps are made of, which is another one once its shards are others."""

    @abstractmethod
    def loader(self, start: int) -> Loader:
        """Return the loader of this rank's share of the steps from ``start`` on."""

    def loader_of(
        self, source: StepSource[B], start: int, reading: ReadingConfig, picture_bytes: int = 0
    ) -> Loader[B]:
        """Make the loader of this rank's steps from ``start`` on, which ``source`` prepares."""
        return Loader(
            source, start, self.config.train.steps, workers=reading.workers, prefetch=reading.prefetch,
            max_bad_samples=reading.max_bad_samples, timeout=self.config.parallel.timeout,
            pin=self.device.type == "cuda", picture_bytes=picture_bytes,
        )

    @abstractmethod
    def flops_per_step(self) -> float:
        """Return the model FLOPs of one optimizer step over all devices."""

    @staticmethod
    @abstractmethod
    def decides_data(key: str) -> bool:
        """Tell whether a step would see other data if this key of the configuration (``a.b.c``) had another value."""

    def averaged(self) -> Pairs:
        """Return pairs of an averaged and a trained parameter, always in the same order."""
        return []

    def follow(self, step: int) -> float:
        """Return the share by which the average moves towards the trained weights in a step."""
        return 0.0

    def is_frozen(self, step: int, group: dict[str, Any]) -> bool:
        """Tell whether a parameter group is frozen in a step."""
        return False

    @abstractmethod
    def check(self, checkpoint: Checkpoint) -> None:
        """Raise a UserError unless a run of this recipe can go on from the checkpoint."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Take from a checkpoint that the run goes on from what neither the engine nor a pass keeps."""
        return

    def facts(self) -> Mapping[str, Any]:
        """Return the JSON that is saved with every checkpoint."""
        return {}

    def watches(self) -> list[Watch]:
        """Return the levels below which terms of the run mean trouble."""
        return []

    def notes(self) -> list[tuple[str, str]]:
        """Return (kind, text) of events to report when the run starts."""
        return []

    def hooks(self, telemetry: Telemetry) -> list[tuple[int, Hook]]:
        """Return (interval, function of the number of steps done): all ranks call it once in so many steps."""
        return []

    def finish(self, telemetry: Telemetry) -> None:
        """Write what a finished run leaves besides its checkpoints: its loss curves. Every rank calls this."""
        if self.mesh.rank == 0:
            output = Path(self.config.output_dir)
            loss_curves(output / METRICS_FILE, output / "loss_curves.png")
