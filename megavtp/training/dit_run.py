"""The training of a DiT put together: latents, model, engine, the one pass, telemetry."""

from __future__ import annotations

from pathlib import Path

import torch

from megavtp.checkpoint.native_dit import FACTS
from megavtp.config.dit import DiTConfig, DiTModelConfig
from megavtp.config.dit_validate import TOWER, flow_share, with_latents
from megavtp.data.latent_batch import LatentStepDataset
from megavtp.data.latents import LatentFolder
from megavtp.data.loader import Loader
from megavtp.models.dit_average import AveragedDiT, build_averaged_dit
from megavtp.models.dit_block import DiTBlock
from megavtp.parallel import phase
from megavtp.parallel.collectives import together
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import Mesh, build_mesh
from megavtp.planning.dit_flops import dit_flops_per_step
from megavtp.training.dit_flow import FlowMatchingPass
from megavtp.training.dit_resume import check_goes_on
from megavtp.training.optimizer import build_optimizer
from megavtp.training.output_dir import OutputDir
from megavtp.training.pictures import loss_curves
from megavtp.training.replay import Unrecorded, replay
from megavtp.training.telemetry import METRICS_FILE, Telemetry
from megavtp.training.trainer import Trainer


class DiTRun:
    """Everything of one run on this rank.

    Args:
        writes: False for a replay, which leaves the run's folder as it is.

    Attributes:
        config: with the sizes of the latents filled in.
    """

    def __init__(self, config: DiTConfig, device: torch.device, *, writes: bool = True):
        phase.enter("opening latents and building the model", slow=True)
        self.device, self._writes = device, writes
        p = config.parallel
        self.mesh = build_mesh(p.tp, p.pp, p.virtual_stages, p.sequence_parallel)
        together(lambda: self._open(config))
        self.engine, self.model = build_dit_engine(self.config, self.mesh, device)

    def _open(self, config: DiTConfig) -> None:
        """All that reads or writes files, any of which may be missing on one machine only."""
        self.folder = LatentFolder(config.data.root)
        self.config = with_sizes_of(self.folder, config)
        if self._writes:
            self.output = OutputDir(self.config, self.mesh.rank == 0)

    def train(self) -> bool:
        """Resume or start, and train; False if a signal stopped the run early (its state is saved)."""
        config, mesh = self.config, self.mesh
        telemetry = Telemetry.of_run(config, mesh, dit_flops_per_step, self.output.keep)
        trainer = self._trainer(telemetry)
        phase.enter("reading the checkpoint", slow=True)
        start = trainer.resume()
        if note := untrained_classes(config.model, self.folder):
            telemetry.event("untrained_classes", step=start, note=note)
        telemetry.start(start)
        self.output.begin()
        finished = trainer.run(start)
        if finished and mesh.rank == 0:
            output = Path(config.output_dir)
            loss_curves(output / METRICS_FILE, output / "loss_curves.png")
        if finished:
            telemetry.event("finished", step=config.train.steps)  # what scripts look for
        telemetry.close()
        self.engine.close()
        return finished

    def replay(self, step: int) -> int:
        """Do ``step`` (from 1) again and print what in it is not finite; returns the exit status."""
        phase.enter("reading the checkpoint", slow=True)
        status = replay(self._trainer(Unrecorded(self.mesh)), step)
        self.engine.close()
        return status

    def _trainer(self, telemetry: Telemetry) -> Trainer:
        config = self.config
        flow = FlowMatchingPass(config, flow_share(config, self.mesh.dp), self.device)
        return Trainer(
            config, self.engine, [flow], self.model.averaged(), lambda step: config.ema_momentum, telemetry,
            self.loader, [], facts=facts_of(self.folder),
            check=lambda checkpoint: check_goes_on(checkpoint, config.model, self.folder),
        )

    def loader(self, start: int) -> Loader:
        """This rank's share of the steps from ``start`` on."""
        dataset = LatentStepDataset(self.folder, self.config, self.mesh.dp_rank, self.mesh.dp)
        return Loader(dataset, start, self.config.train.steps, pin=self.device.type == "cuda")


def with_sizes_of(folder: LatentFolder, config: DiTConfig) -> DiTConfig:
    """``config`` with what the latents decide."""
    channels, size, _ = folder.shape
    return with_latents(
        config, latent_size=size, latent_channels=channels, num_classes=folder.num_classes,
        caption_width=folder.caption_width, has_flips=folder.has_flips,
    )


def untrained_classes(model: DiTModelConfig, folder: LatentFolder) -> str | None:
    """What to tell when the model has room for more classes than the latents have."""
    if model.condition != "class" or model.num_classes == folder.num_classes:
        return None
    return (
        f"model.num_classes = {model.num_classes}, but the labels in {folder.folder} are of {folder.num_classes}: the "
        "others learn nothing; model.num_classes=null takes those that are there"
    )


def facts_of(folder: LatentFolder) -> dict:
    """What a checkpoint states besides its weights: which latents they are for."""
    return {FACTS: {"visual_tokenizer": folder.artifact.to_dict(), "classes": folder.classes}}


def build_dit_engine(config: DiTConfig, mesh: Mesh, device: torch.device) -> tuple[Engine, AveragedDiT]:
    """The DiT, its average a copy of it, inside an engine."""
    p = config.parallel
    model = build_averaged_dit(
        config.model, mesh, seed=config.seed, device=device, recompute=p.recompute, attention=p.attention,
        compute_dtype=torch.bfloat16 if p.precision == "bf16" else torch.float32,
    )
    optimizer = build_optimizer(
        model.named_parameters(), config.train.optimizer, zero_stage=p.zero_stage, tower_of=lambda name: TOWER
    )
    engine = Engine(
        model, optimizer, mesh, zero_stage=p.zero_stage, clip_grad=config.train.optimizer.clip_grad,
        extra=config.deepspeed, leaf_classes=(DiTBlock,), schedule=p.schedule, hold=p.zero3_gather == "step",
    )
    return engine, model
