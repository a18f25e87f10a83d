"""Pre-training: the recipe of the three objectives."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megavtp.checkpoint.formats.initial import fill, open_sources, read_initial
from megavtp.checkpoint.reading import has_checkpoints
from megavtp.checkpoint.store import Checkpoint
from megavtp.config.precision import compute_dtype
from megavtp.config.share import Share, share
from megavtp.config.sizes import ResolvedConfig
from megavtp.config.validate import with_vocabulary
from megavtp.data.batch import StepDataset
from megavtp.data.captions import load_tokenizer
from megavtp.data.loader import Loader
from megavtp.data.shards import open_dataset, split_folder
from megavtp.errors import UserError
from megavtp.models.build import build_vtp
from megavtp.models.lpips import LPIPS, PERCEPTUAL_NETS
from megavtp.models.lpips_weights import load_lpips_weights
from megavtp.models.vtp import VTP
from megavtp.nn.block import Block
from megavtp.parallel.engine import Engine
from megavtp.parallel.looking import from_first, look_once
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.passes import Pass
from megavtp.planning.flops import flops_per_step
from megavtp.pretraining.in_loop import InLoopEvaluation
from megavtp.pretraining.monitors import collapse_watches
from megavtp.pretraining.passes import build_passes
from megavtp.training.optimizer import build_optimizer
from megavtp.training.recipe import Hook, Recipe
from megavtp.training.schedules import cosine
from megavtp.training.state import checkpoint_root, decides_samples, flat_config
from megavtp.training.step import Pairs
from megavtp.training.telemetry import Telemetry
from megavtp.training.watch import Watch


class Pretraining(Recipe):
    """The three objectives that are on, over image-text pairs; the teacher follows the student."""

    config: ResolvedConfig
    _initial: dict[str, Tensor]
    _notes: list[str]
    _opened: dict[str, Checkpoint]  # held open until all ranks have read the initial weights

    def __init__(self, config: ResolvedConfig, device: torch.device):
        super().__init__(config, device)
        self.share = share(config, self.mesh.dp)

    def open(self) -> None:
        config = self.config
        root = config.data.root
        self.train_set = look_once(lambda: open_dataset(split_folder(root, "train")))
        goes_on = config.train.resume == "auto" and from_first(lambda: has_checkpoints(checkpoint_root(config)))
        starts_from = None if goes_on else config.model.init_from
        self._opened = open_sources(starts_from) if starts_from else {}
        self.tokenizer = load_tokenizer(config.data.captions, root, config.model.text.context_length)
        self.config = with_vocabulary(config, self.tokenizer.vocab_size)
        self.perceptual = build_perceptual(config, self.device)
        self._initial, self._notes = {}, []
        if starts_from:
            self._initial, self._notes = read_initial(
                starts_from, self.config.model, frozenset(self.share.passes),
                frozen_encoder=config.objectives.reconstruction.frozen_encoder, opened=self._opened,
            )

    def build(self) -> None:
        self.build_as(VTP, (Block,), self.perceptual)

    def build_as(self, kind: Callable[..., VTP], leaf_classes: tuple[type[nn.Module], ...], *others: object) -> None:
        """Make the model by ``kind``, and its engine; ``others``: further networks to compile."""
        self.model = build_model(self.config, self.share, self.mesh, self.device, self._initial, kind)
        self.compile(self.model, *others)
        self.engine = build_engine(self.model, self.config, self.mesh, leaf_classes)
        self._initial, self._opened = {}, {}

    def passes(self) -> list[Pass]:
        return build_passes(self.config, self.share, self.mesh, self.device, self.perceptual)

    def data_digest(self) -> str:
        return self.train_set.digest

    def loader(self, start: int) -> Loader:
        dataset = StepDataset(self.train_set, self.tokenizer, self.config, self.mesh.dp_rank, self.mesh.dp)
        return self.loader_of(dataset, start, self.config.data, dataset.picture_bytes)

    def flops_per_step(self) -> float:
        return flops_per_step(self.config)["total"]

    @staticmethod
    def decides_data(key: str) -> bool:
        batches_and_masks = re.fullmatch(r"objectives\.(\w+\.batch|self_distillation\.mask_\w+)", key)
        return decides_samples(key) or key == "model.image_size" or batches_and_masks is not None

    def averaged(self) -> Pairs:
        return self.model.averaged()

    def follow(self, step: int) -> float:
        settings = self.config.objectives.self_distillation
        start, end = settings.teacher_momentum, settings.teacher_momentum_end
        return 1 - cosine(step, self.config.train.steps, start, end)

    def is_frozen(self, step: int, group: dict[str, Any]) -> bool:
        steps = self.config.objectives.self_distillation.freeze_last_layer * self.config.train.steps
        return group["prototypes"] and step < steps

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a joint run's checkpoints in a run of the decoder alone, and the other way round."""
        then = flat_config(checkpoint).get("objectives.reconstruction.frozen_encoder", False)
        if then != self.config.objectives.reconstruction.frozen_encoder:
            launcher = "launchers/train_decoder.py" if then else "launchers/pretrain.py"
            raise UserError(
                f"{checkpoint.path} is of a run of {launcher}, which this one does not go on from: set another "
                "output_dir, and name that checkpoint with model.init_from"
            )

    def watches(self) -> list[Watch]:
        return collapse_watches(self.config)

    def notes(self) -> list[tuple[str, str]]:
        return [("initial_weights", note) for note in self._notes]

    def hooks(self, telemetry: Telemetry) -> list[tuple[int, Hook]]:
        self._evaluation = InLoopEvaluation(
            self.config, self.engine, self.mesh, self.train_set, self.tokenizer, self.perceptual, telemetry
        )
        return [
            (self.config.telemetry.pictures_every, self._evaluation.pictures),
            (self.config.evaluation.every, self._evaluation.metrics),
        ]

    def finish(self, telemetry: Telemetry) -> None:
        self._evaluation.finish(self.config.train.steps)
        super().finish(telemetry)


def build_perceptual(
    config: ResolvedConfig, device: torch.device, weights: Mapping[str, Tensor] | None = None
) -> LPIPS | None:
    """Build the perceptual distance that the reconstruction objective asks for, None if it is off.

    On a GPU, where float32 convolutions miss the tensor cores, it computes in the run's precision. ``weights`` replace
    those of the user's file.
    """
    settings = config.objectives.reconstruction
    if settings.weight == 0 or settings.perceptual == "none":
        return None
    net = PERCEPTUAL_NETS[settings.perceptual]
    weights = weights or load_lpips_weights(net, settings.perceptual_weights)
    dtype = compute_dtype(config.parallel.precision) if device.type == "cuda" else torch.float32
    return LPIPS(net, weights, dtype).to(device)


def build_model(
    config: ResolvedConfig, shares: Share, mesh: Mesh, device: torch.device,
    initial: Mapping[str, Tensor] = MappingProxyType({}), kind: Callable[..., VTP] = VTP,
) -> VTP:
    """Build the model of the objectives that are on; its averages are copies of what they follow.

    ``initial`` has whole tensors that replace drawn values. ``kind`` makes the model, see ``build_vtp``.
    """
    model = build_vtp(
        config.model, mesh, kind=kind, objectives=frozenset(shares.passes), seed=config.seed,
        recompute=config.parallel.recompute, attention=config.parallel.attention,
        max_scale=config.objectives.contrastive.max_scale,
        compute_dtype=compute_dtype(config.parallel.precision),
        frozen_encoder=config.objectives.reconstruction.frozen_encoder, device=device,
    )
    if initial:
        fill(model, initial)
    return model


def build_engine(
    model: VTP, config: ResolvedConfig, mesh: Mesh, leaf_classes: tuple[type[nn.Module], ...] = (Block,)
) -> Engine:
    optimizer = build_optimizer(
        model.named_parameters(), config.train.optimizer, zero_stage=config.parallel.zero_on(mesh.dp),
        max_logit_scale=model.max_logit_scale,
    )
    return Engine.of_run(model, optimizer, mesh, config, leaf_classes)
