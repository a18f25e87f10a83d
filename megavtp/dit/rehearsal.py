"""A rehearsal of a DiT's training on one rank of a large world, and what is known of that rank without it."""

from dataclasses import replace
from functools import partial

import torch

from megavtp.config.ranges import need
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.flow_matching import FlowMatchingPass
from megavtp.dit.model.average import AveragedDiT
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.validate import TOWER, flow_share, validate_dit
from megavtp.nn.compiling import wanted
from megavtp.parallel.mesh import Mesh
from megavtp.planning import zero
from megavtp.planning.cost import Sent
from megavtp.training.optimizer import parameter_groups
from megavtp.training.rehearsal import Played, Rehearsed, play

_OF_CONDITION = {"class": "num_classes", "caption": "caption_width"}


def rehearse_dit(given: DiTConfig, world_size: int, rank: int) -> Rehearsed:
    """Check a recipe for a world, play it on one of its ranks, and add what is planned of that rank. UserError."""
    config = validate_dit(given, world_size)
    for name in ("latent_size", "latent_channels", _OF_CONDITION[config.model.condition]):
        need(
            getattr(config.model, name) is not None,
            f"model.{name} = null is that of data.root, which a rehearsal does not read: give its value",
        )
    complete = complete_config(config)
    played = play_dit(complete, world_size, rank)
    return Rehearsed(played, planned_traffic(complete, played.mesh), memory=None)


def play_dit(config: CompleteDiTConfig, world_size: int, rank: int, *, fused_norms: bool = True) -> Played:
    """Play ``config``, validated for the world, on one of its ranks."""
    compiled, uncompiled = wanted(config.parallel.compile, on_gpu=fused_norms), replace(config.parallel, compile="none")

    def make() -> tuple[DiTTraining, LatentBatch]:
        recipe = DiTTraining(replace(config, parallel=uncompiled), torch.device("cpu"))
        return recipe, _batch(config, recipe.mesh.dp)

    terms = {FlowMatchingPass.name: 2}  # the squared error and the cosine
    return play(
        make, rank, world_size, towers={TOWER}, terms=terms, fused_norms=fused_norms, compiled=compiled
    )


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


def planned_traffic(config: CompleteDiTConfig, mesh: Mesh) -> Sent:
    """Return what ZeRO and the gradient norm send on a rank."""
    p, part = config.parallel, flow_share(config, mesh.dp)
    with torch.device("meta"):
        named = list(AveragedDiT(config.model, mesh).named_parameters())
    pieces = zero.pieces(named, partial(parameter_groups, config=config.train.optimizer, tower_of=lambda name: TOWER))
    calls = [zero.Calls("velocity", 0, part.micro_batches, mesh.virtual_stages, mesh.virtual_stages)]
    sent = zero.traffic(
        pieces, p.zero_stage, mesh.dp, calls, shared_bottleneck=False, hold=p.zero3_gather == "step"
    )
    sent += zero.norm_traffic(pieces, p.zero_stage, mesh.dp, mesh.tp * mesh.pp, towers=1)
    return sent
