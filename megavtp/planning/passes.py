"""The memory and traffic of a step's passes on one pipeline rank, put together from the rehearsed parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from megavtp.config.share import PassShare, share
from megavtp.config.sizes import ResolvedConfig
from megavtp.models.cuts import tower_cuts
from megavtp.nn.block import Recompute
from megavtp.parallel.orders import Schedule, bubble, train_order
from megavtp.planning.parts import LEGS, MODES, TOWER_OF, Cost, Rehearsals, Sent, TensorLayout
from megavtp.planning.zero import FLOAT, Calls


@dataclass(frozen=True)
class RankLayout:
    """A layout without ZeRO, and one of its pipeline ranks."""

    tensor: TensorLayout
    dp: int
    pp: int
    pp_rank: int
    virtual_stages: int
    schedule: Schedule
    recompute: Recompute

    @property
    def chunks(self) -> int:
        return self.pp * self.virtual_stages

    @property
    def is_last(self) -> bool:
        return self.pp_rank == self.pp - 1


@dataclass(frozen=True)
class PassCost:
    """What one objective costs on one rank.

    Attributes:
        peak: the most activation bytes at one time.
        activity: bytes that the training forwards of all micro-batches hold together: a measure of the memory
            traffic beside the products.
        sent: payload bytes by (axis, operation).
        bubble: idle time over busy time in the pipeline.
        calls: how often the model is called, for ZeRO.
        forwards: the work on a sample in units of a forward; a plain training pass is 3.
    """

    peak: float
    activity: float
    sent: Sent
    bubble: float
    calls: list[Calls] = field(default_factory=list)
    forwards: float = 3.0


def rank_layout(config: ResolvedConfig, world_size: int, pp_rank: int) -> RankLayout:
    p = config.parallel
    tensor, dp = TensorLayout(p.tp, p.sequence_parallel), world_size // (p.tp * p.pp)
    return RankLayout(tensor, dp, p.pp, pp_rank, p.virtual_stages, p.schedule, p.recompute)


def pass_costs(parts: Rehearsals, config: ResolvedConfig, layout: RankLayout) -> dict[str, PassCost]:
    """Return what each objective that is on costs; ``config`` is validated."""
    shares = share(config, layout.dp).passes
    return {name: pass_cost(parts, config, layout, name, part) for name, part in shares.items()}


def pass_cost(parts: Rehearsals, config: ResolvedConfig, layout: RankLayout, name: str, part: PassShare) -> PassCost:
    """Return what one objective costs with the micro-batches of ``part``."""
    mode, m, count = MODES[name], part.micro_batch, part.micro_batches
    chains = _chains(parts, config, layout, mode, m)
    batch_terms = parts.over_batch(mode, part.local, layout.dp) if layout.is_last else Cost()
    over_batch = mode == "contrastive" or (
        mode == "student" and config.objectives.self_distillation.koleo_weight > 0
    )
    twice = over_batch and count > 1
    if batch_terms.peak and not twice:
        chains[-1].segments.append(batch_terms)
    base, peak, sent = 0.0, batch_terms.peak, _times(batch_terms.forward, 1) + _times(batch_terms.backward, 1)
    calls = [Calls(mode, count if twice else 0, count, len(chains), _embeddings(config, mode))]
    if mode == "student":
        teacher = _chains(parts, config, layout, "teacher", m)
        base = count * teacher[-1].segments[-1].held if layout.is_last else 0.0
        center = parts.centering(part.local, layout.tensor.tp, layout.dp) if layout.is_last else Cost()
        peak = max(peak, base + center.peak, base + max(chain.forward_peak for chain in teacher))
        sent += _times(center.forward, 1)
        sent += _forward_traffic(parts, layout, "teacher", m, count, teacher)
        calls.append(Calls("teacher", count, 0, len(teacher)))
    if twice:
        if layout.is_last:  # the first pass's results stay
            base += count * parts.results(mode, m, layout.tensor.tp).held
        silent = _chains(parts, config, layout, mode, m, loss=False)
        sent += _forward_traffic(parts, layout, mode, m, count, silent)
    for chain in chains:
        own = [s for s in chain.segments if s is not batch_terms]
        for segment in own:
            sent += _times(segment.forward, count) + _times(segment.backward, count)
        sent += _sends(parts, layout, mode, chain.stage, m, count, back=True)
    if layout.pp > 1:
        sent["pp", "broadcast"] += FLOAT * _terms(config, mode)  # the terms are sent to every rank
    V = len(chains)
    peak = max(peak, base + _in_flight(chains, layout, count))
    plain = chains if layout.recompute == "none" else _chains(parts, config, layout, mode, m, redo=False)
    activity = count * sum(chain.held for chain in plain)
    idle = 0.0 if layout.pp == 1 else _bubble(layout.schedule, layout.pp, V, count)
    return PassCost(peak, activity, +sent, idle, calls, 3.0 + twice + (layout.recompute == "full"))


@lru_cache(maxsize=1024)
def _bubble(schedule: Schedule, p: int, V: int, m: int) -> float:
    return (p - 1) / (V * m) if m % p == 0 or V == 1 else bubble(schedule, p, V, m)


@dataclass
class _Chain:
    """The parts of one stage on this rank, in the order of the forward."""

    stage: int
    segments: list[Cost]
    input_bytes: float = 0  # bytes that live to the end of the forward only

    @property
    def held(self) -> float:
        return sum(segment.held for segment in self.segments)

    @property
    def peak(self) -> float:
        """The most bytes at one time: while a part runs backward, only the parts before it still hold theirs."""
        before, most = 0.0, 0.0
        for segment in self.segments:
            most = max(most, before + segment.peak)
            before += segment.held
        return max(most, before, before - self.segments[-1].held + self.input_bytes if self.segments else 0.0)

    @property
    def forward_peak(self) -> float:
        """The most bytes in a forward without graph: one part's, and what the part before it gave out."""
        pairs = zip([Cost(), *self.segments], self.segments)
        return max((before.held + segment.peak for before, segment in pairs), default=0.0)


def _chains(
    parts: Rehearsals, config: ResolvedConfig, layout: RankLayout, mode: str, m: int, *, loss: bool = True,
    redo: bool = True,
) -> list[_Chain]:
    """Return, stage by stage, what this rank runs of a pass; with one rank everything is one stage."""
    cuts = tower_cuts(config.model, parts.objectives, layout.chunks)
    recompute = layout.recompute if redo else "none"
    # In float32 the embedding itself holds them.
    pictures = 0 if parts.dtype == torch.float32 else parts.picture_bytes(mode, m)
    chains = []
    for leg, kinds in enumerate(LEGS[mode]):
        for chunk in range(layout.pp_rank, layout.chunks, layout.pp):
            segments = []
            if chunk == 0:
                segments.append(parts.end(mode, leg, False, m, layout.tensor.tp, loss=loss))
            if layout.pp > 1 and (leg or chunk):  # what came in from the rank before
                size = parts.activation_bytes(mode, leg, chunk == 0, m)
                segments.append(Cost(size, size))
            for kind in kinds:
                blocks = len(cuts[TOWER_OF[kind]][chunk])
                segments.append(parts.stack(kind, blocks, m, layout.tensor, recompute))
            if chunk == layout.chunks - 1:
                if mode == "reconstruction" and leg == 1 and (layout.pp > 1 or parts.dtype != torch.float32):
                    # Elsewhere they are what the embedding holds.
                    segments.append(Cost(parts.target_bytes(m), parts.target_bytes(m)))
                segments.append(parts.end(mode, leg, True, m, layout.tensor.tp, loss=loss))
            stage = leg * layout.chunks + chunk
            chains.append(_Chain(stage, segments, 0 if stage else pictures))
    if layout.pp == 1:
        return [_Chain(0, [segment for chain in chains for segment in chain.segments], pictures)]
    return chains


def _in_flight(chains: Sequence[_Chain], layout: RankLayout, count: int) -> float:
    """Return the most bytes at one time when the rank's operations run in the schedule's order."""
    of_stage = {chain.stage: chain for chain in chains}
    V = len(chains)
    schedule = layout.schedule if layout.pp > 1 else "1f1b"
    now = most = 0.0
    for op in train_order(schedule, layout.pp, layout.pp_rank, V, count):
        chain = of_stage[op.stage]
        if op.kind == "F":
            most = max(most, now + chain.peak)
            now += chain.held
        else:
            now -= chain.held
            most = max(most, now + chain.peak)
    return most


def _forward_traffic(
    parts: Rehearsals, layout: RankLayout, mode: str, m: int, count: int, chains: Sequence[_Chain]
) -> Sent:
    sent: Sent = Counter()
    for chain in chains:
        for segment in chain.segments:
            sent += _times(segment.forward, count)
        sent += _sends(parts, layout, mode, chain.stage, m, count, back=False)
    return sent


def _sends(parts: Rehearsals, layout: RankLayout, mode: str, stage: int, m: int, count: int, *, back: bool) -> Sent:
    """Count what is sent to the next stage or, as gradients, to the stage before."""
    sent: Sent = Counter()
    if layout.pp == 1:
        return sent

    def into(s: int) -> int:
        return parts.activation_bytes(mode, s // layout.chunks, s % layout.chunks == 0, m)

    if stage < len(LEGS[mode]) * layout.chunks - 1:
        sent["pp", "send"] += count * into(stage + 1)
    if back and stage > 0:
        sent["pp", "send"] += count * into(stage)
    return sent


def _times(sent: Sent, count: float) -> Sent:
    return Counter({key: round(value * count) for key, value in sent.items()})


def _embeddings(config: ResolvedConfig, mode: str) -> int:
    return 2 if mode == "student" and config.data.augment.local_crops else 1


def _terms(config: ResolvedConfig, mode: str) -> int:
    """Return how many loss terms a pass reports."""
    if mode == "contrastive":
        return 1
    if mode == "reconstruction":
        return 1 + (config.objectives.reconstruction.perceptual != "none")
    settings = config.objectives.self_distillation
    dino = (2 if config.data.augment.local_crops else 1) if settings.dino_weight else 0
    return dino + bool(settings.ibot_weight) + bool(settings.koleo_weight)
