"""The plan of one layout: its memory, its traffic and the least time that a step can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from megavtp.config.share import share
from megavtp.config.sizes import ResolvedConfig
from megavtp.parallel.traffic import Transfer
from megavtp.planning import zero
from megavtp.planning.devices import Device
from megavtp.planning.flops import flops_per_step
from megavtp.planning.parts import MODES, Rehearsals, Sent
from megavtp.planning.passes import PassCost, pass_costs, rank_layout

T = TypeVar("T")
GIB = 2**30
_ADAM_BYTES = 28  # for a trained float32 parameter: gradient, weight, two moments are read, the last three written
_TEACHER_BYTES = 12
# Beside the products, each held byte is written, read again in the backward, and comes with an intermediate one.
_TOUCHES = 4


@dataclass(frozen=True)
class RankPlan:
    """What one pipeline rank of a layout holds and sends."""

    pp_rank: int
    state: zero.State
    passes: dict[str, PassCost]
    sent: Sent
    owned: int  # elements that the optimizer updates here
    teacher: int

    @property
    def activations(self) -> float:
        return max(cost.peak for cost in self.passes.values())

    @property
    def memory(self) -> float:
        """The most bytes at one time, in the passes or during the update."""
        return self.state.total + max(self.activations, self.state.step)


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
        """The bytes on the fullest rank."""
        return self.fullest.memory

    @cached_property
    def seconds(self) -> dict[str, float]:
        """The least time of a step by cause: the parts do not overlap, and each runs at the device's full rate.

        ``products`` run at peak FLOP/s, ``bubble`` is the idle time beside them, ``elementwise`` runs at full memory
        bandwidth, and each axis sends at the bandwidth of the slowest link that it crosses.
        """
        busy, idle = 0.0, 0.0
        per_objective = flops_per_step(self.config)
        for name, cost in self.ranks[0].passes.items():
            time = per_objective[name] / 3 * cost.forwards / self.world_size / (self.device.peak_tflops * 1e12)
            busy, idle = busy + time, idle + time * cost.bubble
        seconds = {"products": busy, "bubble": idle, "elementwise": max(map(self._elementwise, self.ranks))}
        for axis in ("tp", "pp", "dp"):
            seconds[axis] = max(self._link_seconds(rank, axis) for rank in self.ranks)
        return seconds

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    def _elementwise(self, rank: RankPlan) -> float:
        moved = _TOUCHES * sum(cost.activity for cost in rank.passes.values())
        return (moved + _ADAM_BYTES * rank.owned + _TEACHER_BYTES * rank.teacher) / (self.device.memory_bandwidth * 1e9)

    def group_span(self, axis: str) -> int:
        """Return the span of consecutive ranks that a group of an axis reaches over."""
        p = self.config.parallel
        return {"tp": p.tp, "pp": p.tp * p.pp, "dp": self.world_size}[axis]

    def _link_seconds(self, rank: RankPlan, axis: str) -> float:
        p = self.config.parallel
        size = {"tp": p.tp, "pp": p.pp, "dp": self.dp}[axis]
        inside = self.group_span(axis) <= self.gpus_per_node
        wire = sum(Transfer(a, op, count, size).wire_bytes for (a, op), count in rank.sent.items() if a == axis)
        return wire / ((self.device.inside if inside else self.device.between) * 1e9)


class Planner:
    """Plans layouts of one configuration; it counts each thing once.

    Args:
        config: the configuration, validated without a number of processes.
        groups: groups named parameters as the optimizer does.
    """

    def __init__(
        self, config: ResolvedConfig, groups: zero.Groups, device: Device, gpus_per_node: int = 8, *, cuda: bool = True
    ):
        self.device, self.gpus_per_node = device, gpus_per_node
        self.parts = Rehearsals(config, fused_norms=cuda)
        self.inventory = zero.Inventory(config.model, self.parts.objectives, groups)
        self._known: dict[tuple, Any] = {}

    def plan(self, config: ResolvedConfig, world_size: int, *, draft: bool = False) -> Plan:
        """Plan ``config``, this planner's with another ``parallel`` section or micro-batches, validated for the size.

        A ``draft`` looks at three pipeline ranks only: the first, which holds most micro-batches at a time, the last,
        which has heads and losses, and one between them.
        """
        pp = config.parallel.pp
        chosen = sorted({0, pp // 2, pp - 1}) if draft else range(pp)
        ranks = tuple(self._rank(config, world_size, rank) for rank in chosen)
        return Plan(config, world_size, self.gpus_per_node, self.device, ranks)

    def pieces(self, config: ResolvedConfig, pp_rank: int) -> list[zero.Piece]:
        """Return the parameters of a pipeline rank."""
        p = config.parallel
        key = ("pieces", p.tp, p.pp, pp_rank, p.virtual_stages)
        return self._once(key, lambda: self.inventory.rank(p.tp, p.pp, pp_rank, p.virtual_stages))

    def _once(self, key: tuple, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def least_state(self, config: ResolvedConfig, world_size: int) -> int:
        """Return the bytes without activations on the rank that has the least."""
        pp = config.parallel.pp
        return min(self._state(config, world_size, rank).total for rank in {0, pp // 2, pp - 1})

    def _state(self, config: ResolvedConfig, world_size: int, pp_rank: int) -> zero.State:
        p = config.parallel
        dp, first = world_size // (p.tp * p.pp), MODES[next(iter(share(config, 1).passes))]
        key = ("state", p.tp, p.pp, pp_rank, p.virtual_stages, dp, p.zero_stage, p.zero3_gather)
        hold, pieces = p.zero3_gather == "step", self.pieces(config, pp_rank)
        return self._once(key, lambda: zero.state(pieces, p.zero_stage, dp, first_mode=first, hold=hold))

    def _rank(self, config: ResolvedConfig, world_size: int, pp_rank: int) -> RankPlan:
        p, layout = config.parallel, rank_layout(config, world_size, pp_rank)
        shares = share(config, layout.dp).passes
        sizes = tuple((name, part.micro_batch) for name, part in shares.items())
        passes = self._once((layout, sizes), lambda: pass_costs(self.parts, config, layout))
        pieces = self.pieces(config, pp_rank)
        state = self._state(config, world_size, pp_rank)
        sent: Sent = Counter()
        for cost in passes.values():
            sent += cost.sent
        calls = [call for cost in passes.values() for call in cost.calls]
        shared = not config.model.bottleneck_reconstruction_only
        hold = p.zero3_gather == "step"
        sent += zero.traffic(pieces, p.zero_stage, layout.dp, calls, shared, hold=hold)
        sent += zero.norm_traffic(pieces, p.zero_stage, layout.dp, p.tp * p.pp, self.inventory.towers)
        trained = sum(piece.numel for piece in pieces if piece.trained)
        others = sum(piece.numel for piece in pieces if not piece.trained)
        cut = layout.dp if p.zero_stage > 0 else 1
        return RankPlan(
            pp_rank, state, passes, sent, trained // cut, others // (layout.dp if p.zero_stage == 3 else 1)
        )
