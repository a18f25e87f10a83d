"""A search through all legal layouts of a configuration on a number of devices, for the fastest that fit."""

from collections import Counter
from collections.abc import Iterator, Mapping
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
from megavtp.planning.parts import MODES
from megavtp.planning.plan import Plan, Planner

# (sequence parallelism, recompute), from fast and large to slow and small.
_SAVING: tuple[tuple[bool, Recompute], ...] = (
    (False, "none"), (True, "none"), (False, "selective"), (True, "selective"), (False, "full"), (True, "full"),
)
_SCHEDULES: tuple[tuple[Schedule, int], ...] = (  # gpipe is as fast as 1f1b and holds more
    ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4),
)
_ZERO: tuple[tuple[Literal[0, 1, 2, 3], Literal["block", "step"]], ...] = (
    (0, "block"), (1, "block"), (2, "block"), (3, "block"), (3, "step"),
)
_SMALLER = 4  # a micro-batch is halved at most this often


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        fitting: the best plans that fit, fastest first.
        count: how many layouts fit.
        closest: the plan that needs the least memory, where none fits.
        refused: the messages of the illegal layouts, each with its count.
    """

    fitting: list[Plan]
    count: int
    closest: Plan | None
    refused: Counter[str]


def search(planner: Planner, config: ResolvedConfig, world_size: int, budget: float, keep: int = 5) -> Search:
    """Return the best ``keep`` layouts; a run may use ``budget`` bytes of a device.

    Each layout saves no more memory than it must to fit, as saving more costs time.
    """
    fitting: list[Plan] = []
    closest: Plan | None = None
    refused: Counter[str] = Counter()
    for parallel in layouts(config.parallel, world_size, planner.gpus_per_node):
        try:
            variants = list(_micro_batches(replace(config, parallel=parallel), world_size))
        except UserError as error:
            refused[str(error)] += 1
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
    """Return the first plan that fits for each way to cut micro-batches, saving more and more, and the last tried."""
    for saving in _SAVING:
        if saving[0] and variants[0][0].parallel.tp == 1:
            continue
        fits = False
        for sizes in variants:
            for one in sizes:  # from large to small
                plan = planner.plan(_with(one, saving), world_size, draft=True)
                if plan.memory <= budget:
                    break
            yield plan
            fits = fits or plan.memory <= budget
        if fits:
            return


def _with(config: ResolvedConfig, saving: tuple[bool, Recompute]) -> ResolvedConfig:
    p = config.parallel
    return replace(config, parallel=replace(p, sequence_parallel=saving[0] and p.tp > 1, recompute=saving[1]))


def layouts(given: ParallelConfig, world_size: int, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """Yield every combination of sizes whose product is the world size; ``validate`` decides which are legal."""
    for tp in _divisors(min(gpus_per_node, world_size)):
        for pp in _divisors(world_size // tp) if world_size % tp == 0 else ():
            for schedule, virtual in _SCHEDULES if pp > 1 else _SCHEDULES[:1]:
                for zero, gather in _ZERO if tp * pp < world_size else _ZERO[:1]:
                    yield replace(
                        given, tp=tp, pp=pp, schedule=schedule, virtual_stages=virtual, zero_stage=zero,
                        zero3_gather=gather, sequence_parallel=False, recompute="none",
                    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _micro_batches(config: ResolvedConfig, world_size: int) -> Iterator[list[ResolvedConfig]]:
    """Yield ways to cut a rank's share, each from large to small micro-batches.

    One way takes all pairs at once for the contrastive objective, which saves its second forward. The other takes the
    given micro-batches, or divisors of the share, and halves them again and again. UserError: the layout is illegal.
    """
    plain = _sized(config, dict.fromkeys(MODES), world_size)
    shares = share(plain, world_size // (config.parallel.tp * config.parallel.pp)).passes
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


def _sized(config: ResolvedConfig, sizes: Mapping[str, int | None], world_size: int) -> ResolvedConfig:
    objectives = {name: replace(getattr(config.objectives, name), micro_batch=m) for name, m in sizes.items()}
    return validate(replace(config, objectives=replace(config.objectives, **objectives)), world_size)


def _largest(share: int, ceiling: int) -> int:
    """Return the largest divisor of ``share`` up to ``ceiling``."""
    return max(d for d in _divisors(share) if d <= max(ceiling, 1))
