"""The memory and traffic of a step's passes on one pipeline rank, put together from the rehearsed parts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from megavtp.config.share import PassShare
from megavtp.config.sizes import ResolvedConfig
from megavtp.models.cuts import tower_cuts
from megavtp.nn.block import Recompute
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.orders import Schedule, bubble, train_order
from megavtp.planning.cost import Cost, Sent
from megavtp.planning.parts import LEGS, MODES, Rehearsals
from megavtp.planning.zero import FLOAT, Calls

DISCRIMINATOR_TERMS = 3  # its loss, and its mean answers to real and to decoded pictures


@dataclass(frozen=True)
class RankLayout:
    """A layout without ZeRO; ``mesh`` has no groups, but the coordinates of one of its pipeline ranks."""

    mesh: Mesh
    schedule: Schedule
    recompute: Recompute


@dataclass(frozen=True)
class PassCost:
    """What one objective costs on one rank.

    Attributes:
        peaks: the most activation bytes at one time before the pass's first backward, while that runs, and after it.
        activity: bytes that the training forwards of all micro-batches hold together: a measure of the memory
            traffic beside the products.
        sent: payload bytes by (axis, operation).
        bubble: idle time over busy time in the pipeline.
        calls: how often the model is called, for ZeRO.
        forwards: the work on a sample in units of a forward; a plain training pass is 3.
    """

    peaks: tuple[float, float, float]
    activity: float
    sent: Sent
    bubble: float
    calls: list[Calls]
    forwards: float

    @property
    def peak(self) -> float:
        return max(self.peaks)


def pass_cost(parts: Rehearsals, layout: RankLayout, name: str, part: PassShare) -> PassCost:
    """Return what one objective costs with the micro-batches of ``part``."""
    mesh, config = layout.mesh, parts.config
    mode, m, count = mode_of(config, name), part.micro_batch, part.micro_batches
    adversarial = config.objectives.adversarial
    over_batch = {
        "contrastive": True, "student": config.objectives.self_distillation.koleo_weight > 0,
        "decode": adversarial.weight > 0 and adversarial.adaptive,
    }.get(mode, False)
    twice = over_batch and count > 1
    chains = _chains(parts, layout, mode, m)
    sent = chain_traffic(chains, count, back=True)
    embeddings = 2 if mode == "student" and config.data.augment.local_crops else 1
    calls = [Calls(mode, count if twice else 0, count, len(chains), mesh.virtual_stages, embeddings)]
    base = silent_peak = 0.0  # the bytes that live through the whole pass, and the most before its backwards
    if mode == "decode" and mesh.is_last_stage:
        base = parts.picture_bytes(mode, m) + parts.adversary_bytes(part)  # the former to compare with
    before = [forward for of, forward in (("student", "teacher"), ("decode", "encode")) if of == mode]
    if twice:
        before.append(mode)
    for forward in before:  # without graph
        silent = _chains(parts, layout, forward, m, loss=False)
        sent += chain_traffic(silent, count)
        if mesh.is_last_stage:  # their results stay
            base += count * silent[-1].segments[-1].held
        if forward == "teacher":
            calls.append(Calls("teacher", count, 0, len(silent), mesh.virtual_stages))
            center = parts.centering(part.local, mesh.tp, mesh.dp) if mesh.is_last_stage else Cost()
            sent += center.forward
            silent_peak = base + max(center.peak, *(chain.forward_peak for chain in silent))
        if forward == "encode":
            calls.append(Calls("encode", count, 0, len(silent), mesh.virtual_stages))
            silent_peak = max(base + chain.forward_peak for chain in silent)
            if mesh.pp > 1:  # every rank gets the latents
                latents = count * parts.activation_bytes("reconstruction", 1, True, m)
                sent["pp", "broadcast"] += latents
                base += 0 if mesh.is_last_stage else latents
    if over_batch and mesh.is_last_stage:
        decoding = mode == "decode"
        terms = parts.balanced(part, mesh.dp) if decoding else parts.over_batch(mode, part.local, mesh.dp)
        sent += terms.forward + terms.backward
        silent_peak = max(silent_peak, base + terms.peak)
        if not twice:
            chains[-1].segments.append(terms)
    sent += terms_sent(mesh, term_count(config, mode))
    first, later = in_flight(chains, mesh, layout.schedule, count)
    plain = chains if layout.recompute == "none" else _chains(parts, replace(layout, recompute="none"), mode, m)
    activity = count * sum(chain.held for chain in plain)
    idle = idle_share(layout.schedule, mesh.pp, len(chains), count)
    peaks = silent_peak, base + first, base + later
    return PassCost(peaks, activity, +sent, idle, calls, 3.0 + twice + (layout.recompute == "full"))


def mode_of(config: ResolvedConfig, name: str) -> str:
    """Return the forward that an objective trains by."""
    return "decode" if config.objectives.reconstruction.frozen_encoder else MODES[name]


def discriminator_cost(parts: Rehearsals, mesh: Mesh, part: PassShare) -> PassCost:
    """Return what the discriminator's own pass costs; the last pipeline rank runs it alone and tells its terms."""
    sent = terms_sent(mesh, DISCRIMINATOR_TERMS)
    if not mesh.is_last_stage:
        return PassCost((0.0, 0.0, 0.0), 0.0, sent, 0.0, [], 3.0)
    cost = parts.discriminator(part.micro_batch)
    peak = parts.adversary_bytes(part) + cost.peak
    calls = [Calls("discriminate", 1, part.micro_batches)]
    return PassCost((peak, peak, peak), part.micro_batches * cost.held, sent, 0.0, calls, 3.0)


def terms_sent(mesh: Mesh, count: int) -> Sent:
    """Count the loss terms that the last pipeline rank sends to all."""
    return Counter({("pp", "broadcast"): FLOAT * count} if mesh.pp > 1 else {})


@lru_cache(maxsize=1024)
def idle_share(schedule: Schedule, p: int, V: int, m: int) -> float:
    """Return idle time over busy time of a pass of m micro-batches on p pipeline ranks with V stages each."""
    return (p - 1) / (V * m) if m % p == 0 or V == 1 else bubble(schedule, p, V, m)


@dataclass
class Chain:
    """The parts of one stage on this rank, in the order of the forward.

    Attributes:
        arriving, leaving: bytes of a micro-batch that come from the stage before and go to the next one.
        input_bytes: bytes that live to the end of the forward only.
    """

    segments: list[Cost]
    arriving: int
    leaving: int
    input_bytes: int

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
        return max(most, before, before - self.segments[-1].held + self.input_bytes)

    @property
    def forward_peak(self) -> float:
        """The most bytes in a forward without graph: one part's, and what the part before it gave out."""
        return max(before.held + segment.peak for before, segment in pairwise([Cost(), *self.segments]))


def _chains(parts: Rehearsals, layout: RankLayout, mode: str, m: int, *, loss: bool = True) -> list[Chain]:
    """Return, stage by stage, what this rank runs of a pass; with one rank everything is one stage."""
    mesh = layout.mesh
    cuts = tower_cuts(parts.config.model, parts.objectives, mesh.chunks)
    # In float32 the embedding itself holds the pictures, and a decoder alone takes none.
    pictures = 0 if parts.dtype == torch.float32 or mode == "decode" else parts.picture_bytes(mode, m)
    stages = len(LEGS[mode]) * mesh.chunks

    def into(stage: int) -> int:
        leg, chunk = divmod(stage, mesh.chunks)
        return parts.activation_bytes(mode, leg, chunk == 0, m) if mesh.pp > 1 and 0 < stage < stages else 0

    chains = []
    for stage in range(mesh.pp_rank, stages, mesh.pp):
        leg, chunk = divmod(stage, mesh.chunks)
        segments = []
        if chunk == 0:
            segments.append(parts.end(mode, leg, False, m, mesh.tp, loss=loss))
        if arriving := into(stage):
            segments.append(Cost(arriving, arriving))
        for tower in LEGS[mode][leg]:
            blocks = len(cuts[tower][chunk])
            segments.append(parts.stack(mode, tower, blocks, m, mesh.tp, mesh.sequence_parallel, layout.recompute))
        if chunk == mesh.chunks - 1:
            if mode == "reconstruction" and stage == stages - 1 and (mesh.pp > 1 or pictures):
                # The images to compare with; elsewhere they are what the embedding holds.
                target = parts.picture_bytes(mode, m)
                segments.append(Cost(target, target))
            segments.append(parts.end(mode, leg, True, m, mesh.tp, loss=loss))
        chains.append(Chain(segments, arriving, into(stage + 1), 0 if stage else pictures))
    if mesh.pp == 1:
        return [Chain([segment for chain in chains for segment in chain.segments], 0, 0, pictures)]
    return chains


def in_flight(chains: Sequence[Chain], mesh: Mesh, schedule: Schedule, count: int) -> tuple[float, float]:
    """Return the most bytes at one time up to the end of the first backward, and after it, when the rank's operations
    run in the schedule's order."""
    now, most, later = 0.0, [0.0, 0.0], False
    for op in train_order(schedule if mesh.pp > 1 else "1f1b", mesh.pp, mesh.pp_rank, len(chains), count):
        chain = chains[op.stage // mesh.pp]
        if op.kind == "B":
            now -= chain.held
        most[later] = max(most[later], now + chain.peak)
        if op.kind == "F":
            now += chain.held
        later = later or op.kind == "B"
    return most[0], most[1]


def chain_traffic(chains: Sequence[Chain], count: int, *, back: bool = False) -> Sent:
    """Count what ``count`` micro-batches send inside the stages and to the next ones, in the backward pass, too."""
    sent: Sent = Counter()
    for chain in chains:
        for segment in chain.segments:
            sent += segment.forward + segment.backward if back else segment.forward
        sent["pp", "send"] += chain.leaving + (chain.arriving if back else 0)
    return Counter({key: size * count for key, size in sent.items()})


def term_count(config: ResolvedConfig, mode: str) -> int:
    """Return how many loss terms a pass reports."""
    if mode == "contrastive":
        return 1
    if mode in ("reconstruction", "decode"):
        adversarial = 2 * (config.objectives.adversarial.weight > 0)  # with the adaptive weight
        return 1 + (config.objectives.reconstruction.perceptual != "none") + adversarial
    settings = config.objectives.self_distillation
    dino = (2 if config.data.augment.local_crops else 1) if settings.dino_weight else 0
    return dino + bool(settings.ibot_weight) + bool(settings.koleo_weight)
