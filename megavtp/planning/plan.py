"""The plan of one layout: its memory, its traffic and the least time that a step can take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from megavtp.config.share import PassShare, share
from megavtp.config.sizes import ResolvedConfig
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.traffic import Transfer
from megavtp.planning import zero
from megavtp.planning.cost import Sent
from megavtp.planning.devices import Device
from megavtp.planning.flops import flops_per_step
from megavtp.planning.parts import MODES, Rehearsals, once
from megavtp.planning.passes import PassCost, RankLayout, discriminator_cost, mode_of, pass_cost
from megavtp.planning.second_stage import feature_bytes, shape_of

GIB = 2**30
_ADAM_BYTES = 28  # for a trained float32 parameter: gradient, weight, two moments are read, the last three written
_TEACHER_BYTES = 12
# Beside the products, each held byte is written, read again in the backward, and comes with an intermediate one.
_TOUCHES = 4


def most_bytes(state: zero.State, peaks: Sequence[tuple[float, float, float]], early: bool) -> float:
    """Return the most bytes at one time in a step whose passes have these ``peaks``, see ``PassCost``.

    ``early`` says that gradients are reduced in the last backward of the step only, instead of in each.
    """
    (before, during, after), *others = peaks
    backwards = [state.at(1) + during]
    if after:
        backwards.append(state.at(2) + after)
    backwards += [state.total + max(peak) for peak in others]
    several = len(backwards) > 1
    for number in range(len(backwards)):
        backwards[number] += state.lingering if number else 0
        if not early or number == len(backwards) - 1:
            backwards[number] += state.spilled[number > 0]
    end = state.total + state.end[several] + (state.lingering if several else 0)
    return max(state.setup, state.at(0) + before, *backwards, end, state.at(0) + state.update)


@dataclass(frozen=True)
class RankPlan:
    """What one pipeline rank of a layout holds and sends."""

    pp_rank: int
    state: zero.State
    passes: dict[str, PassCost]
    sent: Sent
    owned: int  # elements that the optimizer updates here
    teacher: int
    early: bool  # see ``most_bytes``

    @property
    def activations(self) -> float:
        return max(cost.peak for cost in self.passes.values())

    @property
    def memory(self) -> float:
        """The most bytes at one time, in the passes or during the update."""
        return most_bytes(self.state, [cost.peaks for cost in self.passes.values()], self.early)

    @property
    def played_memory(self) -> float:
        """The same in a rehearsal, where no device lags behind the host."""
        return replace(self, state=replace(self.state, lingering=0)).memory

    @property
    def moved_bytes(self) -> float:
        """The bytes that a step reads and writes in the device's memory beside its products."""
        activity = sum(cost.activity for cost in self.passes.values())
        return _TOUCHES * activity + _ADAM_BYTES * self.owned + _TEACHER_BYTES * self.teacher

    def wire_bytes(self, axis: str, size: int) -> float:
        """Return the bytes that leave the rank for its group of ``size`` ranks along an axis."""
        return sum(Transfer(a, op, count, size).wire_bytes for (a, op), count in self.sent.items() if a == axis)


@dataclass(frozen=True)
class Plan:
    """A validated configuration on ``world_size`` devices, ``gpus_per_node`` in a machine."""

    config: ResolvedConfig
    world_size: int
    gpus_per_node: int
    device: Device
    ranks: tuple[RankPlan, ...]

    @property
    def dp(self) -> int:
        return self.world_size // (self.config.parallel.tp * self.config.parallel.pp)

    @cached_property
    def fullest(self) -> RankPlan:
        return max(self.ranks, key=lambda rank: rank.memory)

    @property
    def memory(self) -> float:
        return self.fullest.memory

    @cached_property
    def seconds(self) -> dict[str, float]:
        """The least time of a step by cause: the parts do not overlap, and each runs at the device's full rate.

        ``products`` run at peak FLOP/s, ``bubble`` is the idle time beside them, ``elementwise`` runs at full memory
        bandwidth, and each axis sends at the bandwidth of the slowest link that it crosses.
        """
        busy, idle = 0.0, 0.0
        per_objective = flops_per_step(self.config)  # the discriminator's are among the reconstruction's
        for name, cost in self.ranks[0].passes.items():
            time = per_objective.get(name, 0.0) / 3 * cost.forwards / self.world_size / (self.device.peak_tflops * 1e12)
            busy, idle = busy + time, idle + time * cost.bubble
        moved = max(rank.moved_bytes for rank in self.ranks)
        seconds = {"products": busy, "bubble": idle, "elementwise": moved / (self.device.memory_bandwidth * 1e9)}
        p = self.config.parallel
        # By axis, the size of a group and the span of consecutive ranks that it reaches over.
        for axis, size, span in (("tp", p.tp, p.tp), ("pp", p.pp, p.tp * p.pp), ("dp", self.dp, self.world_size)):
            link = self.device.inside if span <= self.gpus_per_node else self.device.between
            seconds[axis] = max(rank.wire_bytes(axis, size) for rank in self.ranks) / (link * 1e9)
        return seconds

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


class Planner:
    """Plans layouts of one configuration; it counts each thing once.

    Args:
        config: the configuration, validated without a number of processes.
        groups: groups named parameters as the optimizer does.
    """

    def __init__(
        self, config: ResolvedConfig, groups: zero.Groups, device: Device, gpus_per_node: int = 8, *, cuda: bool = True
    ):
        self.device, self.gpus_per_node, self.cuda = device, gpus_per_node, cuda
        self.parts = Rehearsals(config, fused_norms=cuda)
        self._zero3_parts = Rehearsals(config, fused_norms=cuda, zero3=True)
        widths = None if self.parts.features is None else self.parts.features.widths
        self.inventory = zero.Inventory(partial(shape_of, config, self.parts.objectives, widths), groups)

    def plan(self, config: ResolvedConfig, world_size: int, *, draft: bool = False) -> Plan:
        """Plan ``config``, this planner's with another ``parallel`` section or micro-batches, validated for the size.

        A ``draft`` looks at three pipeline ranks only: the first, which holds most micro-batches at a time, the last,
        which has heads and losses, and one between them.
        """
        pp = config.parallel.pp
        chosen = sorted({0, pp // 2, pp - 1}) if draft else range(pp)
        ranks = tuple(self._rank(config, world_size, rank) for rank in chosen)
        return Plan(config, world_size, self.gpus_per_node, self.device, ranks)

    def least_state(self, config: ResolvedConfig, world_size: int) -> int:
        """Return the bytes without activations on the rank that has the least."""
        pp = config.parallel.pp
        return min(self._state_of(config, world_size, rank).total for rank in {0, pp // 2, pp - 1})

    @once
    def _pieces(self, mesh: Mesh) -> list[zero.Piece]:
        return self.inventory.rank(mesh.tp, mesh.pp, mesh.pp_rank, mesh.virtual_stages)

    def _state_of(self, config: ResolvedConfig, world_size: int, pp_rank: int) -> zero.State:
        p, mesh = config.parallel, _mesh(config, world_size, pp_rank)
        return self._state(mesh, p.zero_on(mesh.dp), p.zero3_gather, self._reduction(config, mesh))

    def _reduction(self, config: ResolvedConfig, mesh: Mesh) -> zero.Reduction:
        return zero.reduction_of(config.deepspeed, mesh.dp, cuda=self.cuda)

    @once
    def _state(self, mesh: Mesh, stage: int, gather: str, reduction: zero.Reduction) -> zero.State:
        first_mode = next(mode_of(self.parts.config, name) for name in MODES if name in self.parts.objectives)
        state = zero.state(
            self._pieces(mesh), stage, mesh.dp, first_mode=first_mode, hold=gather == "step", reduction=reduction
        )
        features = feature_bytes(self.parts.features) if mesh.is_last_stage else 0  # whole, whatever the stage
        return replace(state, teacher=state.teacher + features)

    @once
    def _pass_cost(self, layout: RankLayout, name: str, part: PassShare, zero3: bool) -> PassCost:
        return pass_cost(self._zero3_parts if zero3 else self.parts, layout, name, part)

    def _rank(self, config: ResolvedConfig, world_size: int, pp_rank: int) -> RankPlan:
        p, mesh = config.parallel, _mesh(config, world_size, pp_rank)
        layout = RankLayout(replace(mesh, sequence_parallel=p.sequence_parallel), p.schedule, p.recompute)
        stage = p.zero_on(mesh.dp)
        zero3 = zero.replaces_linear(config.deepspeed, stage)
        parts = share(config, mesh.dp).passes
        passes = {name: self._pass_cost(layout, name, part, zero3) for name, part in parts.items()}
        if config.objectives.adversarial.weight > 0:
            passes["discriminator"] = discriminator_cost(self.parts, mesh, parts["reconstruction"])
        pieces = self._pieces(mesh)
        calls = [call for cost in passes.values() for call in cost.calls]
        sent = sum((cost.sent for cost in passes.values()), Sent())
        sent += zero.traffic(
            pieces, stage, mesh.dp, calls, not config.model.bottleneck_reconstruction_only,
            hold=p.zero3_gather == "step",
        )
        sent += zero.norm_traffic(stage, mesh.dp, p.tp * p.pp, self.inventory.towers)
        return RankPlan(
            pp_rank, self._state_of(config, world_size, pp_rank), passes, sent,
            *zero.updated(pieces, stage, mesh.dp), early=self._reduction(config, mesh).early(stage),
        )


def _mesh(config: ResolvedConfig, world_size: int, pp_rank: int) -> Mesh:
    """Return a pipeline rank's place in the layout; a rank's state depends on no more than this and ZeRO."""
    p = config.parallel
    dp = world_size // (p.tp * p.pp)
    return Mesh(tp=p.tp, pp=p.pp, dp=dp, pp_rank=pp_rank, virtual_stages=p.virtual_stages)
