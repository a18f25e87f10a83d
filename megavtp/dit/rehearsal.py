"""A rehearsal of a DiT's training on one rank of a large world."""

import torch

from megavtp.config.ranges import need
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.flow_matching import FlowMatchingPass
from megavtp.dit.plan import TERMS, empty_batch, planned
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.validate import TOWER, flow_share, validate_dit
from megavtp.training.rehearsal import Played, Rehearsed, as_on_gpus, play

_OF_CONDITION = {"class": "num_classes", "caption": "caption_width"}


def rehearse_dit(given: DiTConfig, world_size: int, rank: int) -> Rehearsed:
    """Check a recipe for a world, play it on one of its ranks, and add what is planned of that rank. UserError."""
    config = validate_dit(given, world_size)
    for name in ("latent_size", "latent_channels", _OF_CONDITION[config.model.condition]):
        need(
            getattr(config.model, name) is not None,
            f"model.{name} = null is that of data.root, which a rehearsal does not read: give its value",
        )
    complete = as_on_gpus(complete_config(config), world_size)
    played = play_dit(complete, world_size, rank)
    plan = planned(complete, played.mesh)
    return Rehearsed(played, plan.sent, plan.played_memory)


def play_dit(config: CompleteDiTConfig, world_size: int, rank: int, *, fused_norms: bool = True) -> Played:
    """Play ``config``, validated for the world, on one of its ranks."""

    def make() -> tuple[DiTTraining, LatentBatch]:
        recipe = DiTTraining(config, torch.device("cpu"))
        return recipe, empty_batch(config, flow_share(config, recipe.mesh.dp).local)

    terms = {FlowMatchingPass.name: TERMS}
    return play(make, rank, world_size, towers={TOWER}, terms=terms, fused_norms=fused_norms)
