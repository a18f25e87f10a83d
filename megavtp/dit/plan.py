"""What one rank of a DiT's training sends in a step and holds at most, put together from its stages.

A stage is rehearsed for one micro-batch; the schedule and ZeRO are those of ``planning``.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megavtp.config.precision import compute_dtype
from megavtp.config.share import PassShare
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig
from megavtp.dit.flow_matching import FlowMatchingPass, flow_matching_terms, straight_path
from megavtp.dit.model.average import AveragedDiT
from megavtp.dit.validate import TOWER, flow_share
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.rehearsal import rehearsal
from megavtp.planning import zero
from megavtp.planning.cost import Cost, cost_of
from megavtp.planning.passes import Chain, PassCost, chain_traffic, idle_share, in_flight, terms_sent
from megavtp.planning.plan import RankPlan
from megavtp.planning.regions import count_regions
from megavtp.training.optimizer import parameter_groups

TERMS = 2  # the squared error and the cosine


def planned(config: CompleteDiTConfig, mesh: Mesh, *, cuda: bool = True) -> RankPlan:
    """Return what the rank at ``mesh`` holds and sends in a step. UserError."""
    p, part = config.parallel, flow_share(config, mesh.dp)
    stage = p.zero_on(mesh.dp)
    with torch.device("meta"):
        named = list(AveragedDiT(config.model, mesh).named_parameters())
    pieces = zero.pieces(named, partial(parameter_groups, config=config.train.optimizer, tower_of=lambda name: TOWER))
    hold, cost = p.zero3_gather == "step", _pass_cost(config, mesh, part, cuda)
    sent = cost.sent + zero.traffic(pieces, stage, mesh.dp, cost.calls, shared_bottleneck=False, hold=hold)
    sent += zero.norm_traffic(stage, mesh.dp, mesh.tp * mesh.pp, towers=1)
    reduction = zero.reduction_of(config.deepspeed, mesh.dp, cuda=cuda)
    state = zero.state(pieces, stage, mesh.dp, first_mode=FlowMatchingPass.mode, hold=hold, reduction=reduction)
    return RankPlan(
        mesh.pp_rank, state, {FlowMatchingPass.name: cost}, sent, *zero.updated(pieces, stage, mesh.dp),
        early=reduction.early(stage),
    )


def _pass_cost(config: CompleteDiTConfig, mesh: Mesh, part: PassShare, cuda: bool) -> PassCost:
    """Count the pass: the rank's stages, one after the other."""
    p, count, V = config.parallel, part.micro_batches, mesh.virtual_stages
    chains = _chains(config, mesh, part, cuda)
    plain = replace(config, parallel=replace(p, recompute="none"))
    held = chains if p.recompute == "none" else _chains(plain, mesh, part, cuda)
    return PassCost(
        peaks=(0.0, *in_flight(chains, mesh, p.schedule, count)), activity=count * sum(chain.held for chain in held),
        sent=chain_traffic(chains, count, back=True) + terms_sent(mesh, TERMS),
        bubble=idle_share(p.schedule, mesh.pp, V, count), calls=[zero.Calls(FlowMatchingPass.mode, 0, count, V, V)],
        forwards=3.0 + (p.recompute == "full"),
    )


def _chains(config: CompleteDiTConfig, mesh: Mesh, part: PassShare, cuda: bool) -> list[Chain]:
    return [_chain(config, mesh, stage, part, cuda) for stage in range(mesh.pp_rank, mesh.chunks, mesh.pp)]


def empty_batch(config: CompleteDiTConfig, count: int) -> LatentBatch:
    """Make ``count`` samples as they come from the loader, in a rehearsal without data."""
    model = config.model
    latents = torch.empty(count, model.latent_channels, model.latent_size, model.latent_size)
    conditions = torch.empty(count, dtype=torch.long)
    if model.condition == "caption":
        conditions = torch.empty(count, model.caption_width or 0)
    return LatentBatch(
        step=0, ids=[], positions=torch.arange(count), latents=latents, noise=torch.empty_like(latents),
        times=torch.empty(count), conditions=conditions, bad=[],
    )


def _chain(config: CompleteDiTConfig, mesh: Mesh, stage: int, part: PassShare, cuda: bool) -> Chain:
    """Count one micro-batch in a stage of the pass."""
    p, last = config.parallel, mesh.chunks - 1
    fields: dict[str, Any] = {"pp": mesh.pp, "pp_rank": mesh.pp_rank, "virtual_stages": mesh.virtual_stages}
    fields["zero3"] = zero.replaces_linear(config.deepspeed, p.zero_on(mesh.dp))
    with rehearsal(tp=mesh.tp, sequence_parallel=mesh.sequence_parallel, fused_norms=cuda, **fields) as place:
        model = AveragedDiT(
            config.model, place, recompute=p.recompute, attention=p.attention, compute_dtype=compute_dtype(p.precision)
        )
        count_regions(p.compile, cuda, model)
        batch = empty_batch(config, part.micro_batch)
        specs = model.activation_specs("velocity", stage, x=batch.latents)
        size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)
        arrived = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape, dtype in specs] if stage else []

        def forward() -> Tensor | tuple[Tensor, ...]:
            points, target = straight_path(batch.latents, batch.noise, batch.times)
            inputs = {"x": points, "t": batch.times, "y": batch.conditions}
            out = model("velocity", stage if mesh.pp > 1 else None, arrived, **inputs)
            if stage < last:
                return out
            return sum(flow_matching_terms(out, target, samples_total_local=part.local).values(), torch.zeros(()))

        cost = cost_of(place, forward, list(model.dit.parameters()), arrived)
    arriving, leaving = size if stage else 0, size if stage < last else 0
    return Chain([Cost(arriving, arriving), cost], arriving, leaving, 0)
