"""A rehearsal of a DiT's training on one rank of a large world."""

import torch

from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig
from megavtp.dit.flow_matching import FlowMatchingPass
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.validate import TOWER, flow_share
from megavtp.training.rehearsal import Played, play


def rehearse_dit(config: CompleteDiTConfig, world_size: int, rank: int, *, fused_norms: bool = True) -> Played:
    """Play ``config``, validated for the world, on one of its ranks."""

    def make() -> tuple[DiTTraining, LatentBatch]:
        recipe = DiTTraining(config, torch.device("cpu"))
        return recipe, _batch(config, recipe.mesh.dp)

    terms = {FlowMatchingPass.name: 2}  # the squared error and the cosine
    return play(make, rank, world_size, towers={TOWER}, terms=terms, fused_norms=fused_norms)


def _batch(config: CompleteDiTConfig, dp: int) -> LatentBatch:
    """Make a rank's share of a step as it comes from the loader."""
    count, model = flow_share(config, dp).local, config.model
    latents = torch.empty(count, model.latent_channels, model.latent_size, model.latent_size)
    conditions = torch.empty(count, dtype=torch.long)
    if model.condition == "caption":
        conditions = torch.empty(count, model.caption_width or 0)
    return LatentBatch(
        step=0, ids=[], positions=torch.arange(count), latents=latents, noise=torch.empty_like(latents),
        times=torch.empty(count), conditions=conditions, bad=[],
    )
