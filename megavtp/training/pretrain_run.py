"""A pre-training run put together: data, model, engine, passes, telemetry, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megavtp.checkpoint.formats.initial import fill, read_initial
from megavtp.checkpoint.reading import has_checkpoints
from megavtp.checkpoint.store import Checkpoint
from megavtp.config.schema import Config
from megavtp.config.share import Share, share
from megavtp.config.validate import with_vocabulary
from megavtp.data.batch import StepDataset
from megavtp.data.captions import load_tokenizer
from megavtp.data.files import refuse_hub_id
from megavtp.data.loader import Loader
from megavtp.data.shards import open_dataset, split_folder
from megavtp.errors import UserError
from megavtp.models.build import build_vtp
from megavtp.models.lpips import LPIPS, PERCEPTUAL_NETS
from megavtp.models.lpips_weights import load_lpips_weights
from megavtp.models.vtp import VTP
from megavtp.nn.block import Block
from megavtp.parallel import phase
from megavtp.parallel.collectives import together
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import Mesh, build_mesh
from megavtp.training.in_loop import InLoopEvaluation
from megavtp.training.optimizer import build_optimizer
from megavtp.training.output_dir import OutputDir
from megavtp.training.pretraining import build_passes, frozen_prototypes, teacher_momentum
from megavtp.training.replay import Unrecorded, replay
from megavtp.training.state import flat_config
from megavtp.training.telemetry import Telemetry
from megavtp.training.trainer import Hook, Trainer, checkpoint_root


class PretrainRun:
    """Everything of one run on this rank.

    Args:
        writes: False for a replay, which leaves the run's folder as it is.

    Attributes:
        config: with the caption tokenizer's vocabulary filled in.
    """

    def __init__(self, config: Config, device: torch.device, *, writes: bool = True):
        phase.enter("opening data and building the model", slow=True)
        self.device, self._writes = device, writes
        p = config.parallel
        self.mesh = build_mesh(p.tp, p.pp, p.virtual_stages, p.sequence_parallel)
        self.share = share(config, self.mesh.dp)
        together(lambda: self._open(config))
        self.engine, self.model = build_engine(self.config, self.share, self.mesh, device, self._initial)
        del self._initial

    def _open(self, config: Config) -> None:
        """All that reads or writes files, any of which may be missing on one machine only."""
        root = config.data.root
        self.train_set = open_dataset(split_folder(root, "train"))
        self.tokenizer = load_tokenizer(config.data.captions, root, config.model.text.context_length)
        self.config = with_vocabulary(config, self.tokenizer.vocab_size)
        self.perceptual = build_perceptual(config, self.device)
        self._initial, self._notes = self._read_initial()
        if self._writes:
            self.output = OutputDir(self.config, self.mesh.rank == 0)

    def _read_initial(self) -> tuple[dict[str, Tensor], list[str]]:
        """What ``model.init_from`` gives, unless there is a checkpoint to go on from."""
        config = self.config
        goes_on = config.train.resume == "auto" and has_checkpoints(checkpoint_root(config))
        if config.model.init_from is None or goes_on:
            return {}, []
        for path in config.model.init_from.split(","):
            refuse_hub_id(path.strip())
        return read_initial(
            config.model.init_from, config.model, frozenset(self.share.passes),
            frozen_encoder=config.objectives.reconstruction.frozen_encoder,
        )

    def train(self) -> bool:
        """Resume or start, train, evaluate; False if a signal stopped the run early (its state is saved)."""
        config, mesh = self.config, self.mesh
        telemetry = Telemetry.of_run(config, mesh, keep_folder=self.output.keep)
        evaluation = InLoopEvaluation(config, self.engine, mesh, self.tokenizer, self.perceptual, telemetry)
        every = [
            (config.telemetry.pictures_every, evaluation.pictures), (config.evaluation.every, evaluation.metrics)
        ]
        trainer = self._trainer(telemetry, every)
        phase.enter("reading the checkpoint", slow=True)
        for note in self._notes:
            telemetry.event("initial_weights", step=0, note=note)
        start = trainer.resume()
        telemetry.start(start)
        self.output.begin()
        finished = trainer.run(start)
        if finished:
            phase.enter("the last evaluation", slow=True)
            evaluation.finish(config.train.steps)
        if finished:
            telemetry.event("finished", step=config.train.steps)  # what scripts look for
        telemetry.close()
        self.engine.close()
        return finished

    def replay(self, step: int) -> int:
        """Do ``step`` (from 1) again and print what in it is not finite; returns the exit status."""
        phase.enter("reading the checkpoint", slow=True)
        status = replay(self._trainer(Unrecorded(self.mesh), []), step)
        self.engine.close()
        return status

    def _trainer(self, telemetry: Telemetry, every: list[tuple[int, Hook]]) -> Trainer:
        config = self.config
        passes = build_passes(config, self.share, self.mesh, self.device, self.perceptual)
        pairs = self.model.teacher_pairs() if self.share.self_distillation else []
        return Trainer(
            config, self.engine, passes, pairs, teacher_momentum(config), telemetry, self.loader, every,
            frozen=frozen_prototypes(config), check=lambda checkpoint: _check_same_stage(checkpoint, config),
        )

    def loader(self, start: int) -> Loader:
        """This rank's share of the steps from ``start`` on."""
        dataset = StepDataset(self.train_set, self.tokenizer, self.config, self.mesh.dp_rank, self.mesh.dp)
        return Loader(dataset, start, self.config.train.steps, pin=self.device.type == "cuda")


def _check_same_stage(checkpoint: Checkpoint, config: Config) -> None:
    """UserError where a run of the decoder alone would go on in the checkpoints of a joint run, or the other way."""
    then = flat_config(checkpoint).get("objectives.reconstruction.frozen_encoder", False)
    if then != config.objectives.reconstruction.frozen_encoder:
        raise UserError(
            f"{checkpoint.path} is of a run with objectives.reconstruction.frozen_encoder={str(then).lower()}, which "
            "this one does not go on from: set another output_dir, and name that checkpoint with model.init_from"
        )


def build_perceptual(config: Config, device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The perceptual distance that the reconstruction objective asks for, None if it is off."""
    settings = config.objectives.reconstruction
    if settings.weight == 0 or settings.perceptual == "none":
        return None
    net = PERCEPTUAL_NETS[settings.perceptual]
    return LPIPS(net, load_lpips_weights(net, settings.perceptual_weights)).to(device)


def build_engine(
    config: Config, shares: Share, mesh: Mesh, device: torch.device,
    initial: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Engine, VTP]:
    """The model of the objectives that are on, its teacher a copy of the student, inside an engine.

    ``initial``: whole tensors in place of the drawn values.
    """
    objectives = frozenset(shares.passes)
    model = build_vtp(
        config.model, mesh, objectives=objectives, seed=config.seed,
        recompute=config.parallel.recompute, attention=config.parallel.attention,
        max_scale=config.objectives.contrastive.max_scale,
        compute_dtype=torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32,
        frozen_encoder=config.objectives.reconstruction.frozen_encoder, device=device,
    )
    if initial:
        fill(model, initial)
    optimizer = build_optimizer(
        model.named_parameters(), config.train.optimizer, zero_stage=config.parallel.zero_stage,
        max_logit_scale=model.max_logit_scale,
    )
    engine = Engine(
        model, optimizer, mesh, zero_stage=config.parallel.zero_stage, clip_grad=config.train.optimizer.clip_grad,
        extra=config.deepspeed, leaf_classes=(Block,), schedule=config.parallel.schedule,
        hold=config.parallel.zero3_gather == "step",
    )
    return engine, model
