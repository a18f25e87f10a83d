"""The recipe that trains a DiT has one pass, flow matching, over a folder of latents."""

from collections.abc import Mapping
from typing import Any

from megavtp.checkpoint.store import Checkpoint
from megavtp.config.precision import compute_dtype
from megavtp.data.loader import Loader
from megavtp.dit.batch import LatentStepDataset
from megavtp.dit.checkpoint import check_goes_on, stored_facts
from megavtp.dit.config import CompleteDiTConfig
from megavtp.dit.flow_matching import FlowMatchingPass
from megavtp.dit.model.block import DiTBlock
from megavtp.dit.model.build import build_averaged_dit
from megavtp.dit.summary import dit_flops
from megavtp.dit.validate import TOWER, flow_share, with_latents
from megavtp.latents.folder import LatentFolder
from megavtp.parallel.engine import Engine
from megavtp.parallel.looking import look_once
from megavtp.parallel.passes import Pass
from megavtp.training.optimizer import build_optimizer
from megavtp.training.recipe import Recipe
from megavtp.training.state import decides_samples
from megavtp.training.step import Pairs


class DiTTraining(Recipe):
    """Flow matching over the latents of a tokenizer; samples are drawn with the average of the weights."""

    config: CompleteDiTConfig

    def open(self) -> None:
        self.folder = look_once(lambda: LatentFolder(self.config.data.root))
        self.config = with_latents(self.config, self.folder)

    def build(self) -> None:
        config, p = self.config, self.config.parallel
        self.model = build_averaged_dit(
            config.model, self.mesh, seed=config.seed, device=self.device, recompute=p.recompute, attention=p.attention,
            compute_dtype=compute_dtype(p.precision),
        )
        self.compile(self.model)
        optimizer = build_optimizer(
            self.model.named_parameters(), config.train.optimizer, zero_stage=p.zero_on(self.mesh.dp),
            tower_of=lambda name: TOWER,
        )
        self.engine = Engine.of_run(self.model, optimizer, self.mesh, config, leaf_classes=(DiTBlock,))

    def passes(self) -> list[Pass]:
        return [FlowMatchingPass(self.config, flow_share(self.config, self.mesh.dp), self.device)]

    def data_digest(self) -> str:
        return self.folder.digest

    def loader(self, start: int) -> Loader:
        dataset = LatentStepDataset(self.folder, self.config, self.mesh.dp_rank, self.mesh.dp)
        return self.loader_of(dataset, start, self.config.data)

    def flops_per_step(self) -> float:
        return 3.0 * self.config.train.batch_size * dit_flops(self.config.model)

    @staticmethod
    def decides_data(key: str) -> bool:
        times_and_conditions = ("flow_matching.time_mu", "flow_matching.time_sigma", "flow_matching.condition_dropout")
        return decides_samples(key) or key in (*times_and_conditions, "model.condition")

    def averaged(self) -> Pairs:
        return self.model.averaged()

    def follow(self, step: int) -> float:
        return 1 - self.config.ema_momentum

    def check(self, checkpoint: Checkpoint) -> None:
        check_goes_on(checkpoint, self.config.model, self.folder)

    def facts(self) -> Mapping[str, Any]:
        return stored_facts(self.folder.artifact, self.folder.classes)

    def notes(self) -> list[tuple[str, str]]:
        model, folder = self.config.model, self.folder
        if model.condition != "class" or model.num_classes == folder.num_classes:
            return []
        return [(
            "untrained_classes",
            f"model.num_classes = {model.num_classes}, but the labels in {folder.folder} are of {folder.num_classes}: "
            "the others learn nothing; model.num_classes=null takes those that are there",
        )]
