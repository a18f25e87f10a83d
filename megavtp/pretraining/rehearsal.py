"""A rehearsal of pre-training on one rank of a large world."""

from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from megavtp.config.precision import compute_dtype
from megavtp.config.schema import Config
from megavtp.config.share import share
from megavtp.config.sizes import GLOBAL_CROPS, ResolvedConfig
from megavtp.config.validate import with_vocabulary
from megavtp.data.batch import Batch
from megavtp.models.latent_noise import LatentNoise
from megavtp.models.lpips import PERCEPTUAL_NETS, empty_lpips
from megavtp.nn.drop_path import BranchDrop, DropPlan
from megavtp.parallel.mesh import SINGLE
from megavtp.planning.devices import find_device
from megavtp.planning.flops import expected_masked_patches, patches_of
from megavtp.planning.passes import DISCRIMINATOR_TERMS, mode_of, term_count
from megavtp.planning.plan import Planner
from megavtp.planning.second_stage import features_of, shape_of
from megavtp.pretraining import passes
from megavtp.pretraining.recipe import Pretraining
from megavtp.pretraining.validate import validate_pretraining
from megavtp.training.optimizer import parameter_groups
from megavtp.training.rehearsal import Played, Rehearsed, as_on_gpus, play

CLIP_VOCABULARY = 49_408


class WithoutFiles(Pretraining):
    """Pre-training that reads no file."""

    def open(self) -> None:
        net = PERCEPTUAL_NETS.get(self.config.objectives.reconstruction.perceptual)
        self.perceptual = net and empty_lpips(net, compute_dtype(self.config.parallel.precision))
        self._initial = {}

    def batch(self) -> Batch:
        """Make this rank's share of a step as it comes from the loader."""
        config, augment = self.config, self.config.data.augment
        local = {name: part.local for name, part in self.share.passes.items()}
        views, pairs, size = local.get("self_distillation", 0), local.get("contrastive", 0), config.model.image_size

        def pictures(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.uint8)

        return Batch(
            step=0, ids=[], positions=torch.arange(self.share.images), bad=[],
            images=pictures(self.share.images, 3, size, size),
            tokens=torch.empty(pairs, config.model.text.context_length, dtype=torch.long),
            ssl_rows=torch.arange(views), rec_rows=torch.arange(local.get("reconstruction", 0)),
            global_crops=pictures(GLOBAL_CROPS, views, 3, augment.global_size, augment.global_size),
            local_crops=pictures(augment.local_crops, views, 3, augment.local_size, augment.local_size),
            masks=torch.empty(GLOBAL_CROPS, views, patches_of(config.model, augment.global_size), dtype=torch.bool),
        )


def rehearse_pretraining(given: Config, world_size: int, rank: int) -> Rehearsed:
    """Check a recipe for a world, play it on one of its ranks, and add what is planned of that rank. UserError.

    A vocabulary that the data decide is taken as CLIP's.
    """
    config = as_on_gpus(with_some_vocabulary(validate_pretraining(given, world_size)), world_size)
    return beside_the_plan(config, world_size, play_pretraining(config, world_size, rank))


def with_some_vocabulary(config: ResolvedConfig) -> ResolvedConfig:
    """Return ``config`` with CLIP's vocabulary if the data are to decide its size."""
    return config if config.model.text.vocab_size is not None else with_vocabulary(config, CLIP_VOCABULARY)


def beside_the_plan(config: ResolvedConfig, world_size: int, played: Played, *, cuda: bool = True) -> Rehearsed:
    """Add what is planned of the rank that was played."""
    groups = partial(parameter_groups, config=config.train.optimizer)
    planner = Planner(config, groups, find_device("h100"), cuda=cuda)
    plan = planner.plan(config, world_size).ranks[played.mesh.pp_rank]
    return Rehearsed(played, plan.sent, plan.played_memory)


def play_pretraining(
    config: ResolvedConfig, world_size: int, rank: int, *, fused_norms: bool = True,
    recipe: type[WithoutFiles] = WithoutFiles,
) -> Played:
    """Play ``config``, validated for the world and with a vocabulary, on one of its ranks.

    What chance decides has its expected number: masked patches, and the sequences that drop path keeps.
    """

    def make() -> tuple[Pretraining, Batch]:
        run = recipe(config, torch.device("cpu"))
        run.open()
        return run, run.batch()

    objectives = frozenset(share(config, 1).passes)
    features = features_of(config, compute_dtype(config.parallel.precision))
    with torch.device("meta"):
        whole = shape_of(config, objectives, None if features is None else features.widths, SINGLE)
    towers = {group["tower"] for group in parameter_groups(whole.named_parameters(), config.train.optimizer)}
    terms = {name: term_count(config, mode_of(config, name)) for name in objectives}
    terms["discriminator"] = DISCRIMINATOR_TERMS
    with patch.multiple(
        passes, masked_rows=partial(_masked_rows, config), draw_drop_plan=_drop_plan, draw_latent_noise=_latent_noise
    ):
        return play(make, rank, world_size, towers=towers, terms=terms, fused_norms=fused_norms)


def _masked_rows(config: ResolvedConfig, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for ``data.batch.masked_rows``; ``masks`` are (2, b, N)."""
    count = round(masks.shape[1] * expected_masked_patches(config))
    return torch.empty(count, dtype=torch.long), torch.empty(count)


def _drop_plan(*, depth: int, rate: float, local_rows: Sequence[Tensor], **_: object) -> DropPlan | None:
    """Stand in for ``nn.drop_path.draw_drop_plan``."""
    if rate == 0:
        return None
    rows = tuple(torch.empty(max(round(len(held) * (1 - rate)), 1), dtype=torch.long) for held in local_rows)
    branch = BranchDrop(rows, (1 / (1 - rate),) * len(rows))
    return DropPlan(((branch, branch),) * depth)


def _latent_noise(*, images: Sequence[int], shape: tuple[int, int, int], **_: object) -> LatentNoise:
    """Stand in for ``models.latent_noise.draw_latent_noise``."""
    return LatentNoise(torch.empty(len(images), *shape), torch.empty(len(images), 1, 1, 1))
