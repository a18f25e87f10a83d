"""All legal layouts of a configuration on a number of devices, the fastest that fit first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from megavtp.config.run import ParallelConfig
from megavtp.config.share import share
from megavtp.config.sizes import ResolvedConfig
from megavtp.config.validate import validate
from megavtp.errors import UserError
from megavtp.nn.block import Recompute
from megavtp.parallel.orders import Schedule
from megavtp.planning.plan import Plan, Planner

# (sequence parallelism, recompute), from fast and large to slow and small.
_SAVING: tuple[tuple[bool, Recompute], ...] = (
    (False, "none"), (True, "none"), (False, "selective"), (True, "selective"), (False, "full"), (True, "full"),
)
_SCHEDULES: tuple[tuple[Schedule, int], ...] = (  # gpipe only holds more
    ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4),
)
_ZERO: tuple[tuple[Literal[0, 1, 2, 3], Literal["block", "step"]], ...] = (
    (0, "block"), (1, "block"), (2, "block"), (3, "block"), (3, "step"),
)
_SMALLER = 4  # times a micro-batch is halved at most


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        fitting: the best that fit, fastest first.
        count: how many layouts fit.
        closest: where none fits, the plan that needs least memory.
        refused: why a layout of every kind tried was illegal, message by message with how often.
    """

    fitting: list[Plan]
    count: int
    closest: Plan | None
    refused: dict[str, int]


def search(planner: Planner, config: ResolvedConfig, world_size: int, budget: float, keep: int = 5) -> Search:
    """The best ``keep`` layouts; ``budget``: bytes on a device that a run may use.

    Of each layout the mildest means to save memory that suffices is taken: what saves more costs time.
    """
    fitting: list[Plan] = []
    closest: Plan | None = None
    refused: dict[str, int] = {}
    for parallel in layouts(config.parallel, world_size, planner.gpus_per_node):
        try:
            variants = list(_micro_batches(replace(config, parallel=parallel), world_size))
        except UserError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
            continue
        if planner.least_state(variants[0][0], world_size) > budget:
            plans = [planner.plan(_with(variants[-1][-1], _SAVING[-1]), world_size, draft=True)]
        else:
            plans = list(_mildest(planner, variants, world_size, budget))
        fitting += [plan for plan in plans if plan.memory <= budget]
        closest = min([*plans, *([closest] if closest else [])], key=lambda plan: plan.memory)
    fitting.sort(key=lambda plan: (plan.step_seconds, plan.memory))
    whole = (planner.plan(plan.config, world_size) for plan in fitting)
    best = list(islice((plan for plan in whole if plan.memory <= budget), keep))
    return Search(best, len(fitting), None if best else closest, refused)


def _mildest(planner: Planner, variants: list[list[ResolvedConfig]], world_size: int, budget: float) -> Iterator[Plan]:
    """For each way to cut micro-batches the first plan that fits, saving more and more; and the last one tried."""
    for saving in _SAVING:
        if saving[0] and variants[0][0].parallel.tp == 1:
            continue
        fits = False
        for sizes in variants:
            for one in sizes:  # from large to small
                plan = planner.plan(_with(one, saving), world_size, draft=True)
                if plan.memory <= budget:
                    fits = True
                    break
            yield plan
        if fits:
            return


def _with(config: ResolvedConfig, saving: tuple[bool, Recompute]) -> ResolvedConfig:
    tokens, recompute = saving
    tokens = tokens and config.parallel.tp > 1
    return replace(config, parallel=replace(config.parallel, sequence_parallel=tokens, recompute=recompute))


def layouts(given: ParallelConfig, world_size: int, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """Every combination of sizes that multiply to the world; what of it is legal, ``validate`` decides."""
    for tp in _divisors(min(gpus_per_node, world_size)):
        for pp in _divisors(world_size // tp) if world_size % tp == 0 else ():
            for schedule, virtual in _SCHEDULES if pp > 1 else _SCHEDULES[:1]:
                for zero, gather in _ZERO:
                    yield replace(
                        given, tp=tp, pp=pp, schedule=schedule, virtual_stages=virtual, zero_stage=zero,
                        zero3_gather=gather, sequence_parallel=False, recompute="none",
                    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _micro_batches(config: ResolvedConfig, world_size: int) -> Iterator[list[ResolvedConfig]]:
    """Ways to cut a rank's share, each from large to small: all pairs at once for the contrastive objective, which
    saves its second forward, and the given micro-batches, or what divides the share, halved and halved again.

    Raises UserError where the layout is illegal.
    """
    p = config.parallel
    whole = {name: replace(getattr(config.objectives, name), micro_batch=None) for name in _OBJECTIVES}
    plain = validate(replace(config, objectives=replace(config.objectives, **whole)), world_size)
    shares = share(plain, world_size // (p.tp * p.pp)).passes
    given = {name: getattr(config.objectives, name).micro_batch or part.local for name, part in shares.items()}
    seen = set()
    for all_pairs in (True, False):
        configs = []
        for halvings in range(_SMALLER + 1):
            sizes = {name: _largest(part.local, given[name] >> halvings) for name, part in shares.items()}
            if all_pairs and "contrastive" in sizes:
                sizes["contrastive"] = shares["contrastive"].local
            if tuple(sizes.items()) not in seen:
                seen.add(tuple(sizes.items()))
                configs.append(_sized(plain, sizes, world_size))
        if configs:
            yield configs


def _sized(config: ResolvedConfig, sizes: dict[str, int], world_size: int) -> ResolvedConfig:
    objectives = {name: replace(getattr(config.objectives, name), micro_batch=m) for name, m in sizes.items()}
    return validate(replace(config, objectives=replace(config.objectives, **objectives)), world_size)


_OBJECTIVES = ("contrastive", "self_distillation", "reconstruction")


def _largest(share: int, ceiling: int) -> int:
    """The largest divisor of ``share`` up to ``ceiling``, at least 1."""
    return max(d for d in _divisors(share) if d <= max(ceiling, 1))
