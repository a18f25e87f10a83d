"""The whole step of a run, played by one rank of a large world without data, without the other ranks and their memory.

Beside it stands what the planner says of that rank.
"""

import sys
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from time import process_time
from typing import Any, TypeVar
from unittest.mock import patch

from megavtp.config.load import merged
from megavtp.config.run import RunConfig
from megavtp.parallel.mesh import AXES, Axis, Mesh, members
from megavtp.parallel.rehearsal import rehearsed_rank
from megavtp.parallel.striping import Stripe
from megavtp.parallel.traffic import Traffic, count_traffic
from megavtp.planning.cost import Sent
from megavtp.planning.plan import GIB
from megavtp.planning.regions import count_regions
from megavtp.training.recipe import Recipe
from megavtp.training.step import train_step

C = TypeVar("C", bound=RunConfig)
_STEPS = 2  # the first makes what stays, such as moments
_CLOSE = 0.1  # relative error of a planned peak


@dataclass(frozen=True)
class Played:
    """What one rank held and did.

    Attributes:
        groups: the ranks of each group that it is in, by axis.
        blocks: the numbers of its blocks, by the name of the tower in the model.
        peak: the most bytes at one time, from before the model is built to the end of the last step.
        traffic: what it took part in sending in the last step.
        seconds: of one core that each part of the play took.
    """

    mesh: Mesh
    groups: Mapping[Axis, list[int]]
    blocks: Mapping[str, list[int]]
    peak: int
    traffic: Traffic
    seconds: Mapping[str, float]


def as_on_gpus(config: C, world_size: int) -> C:
    """Return ``config`` with ``overlap_comm`` as it is by default on GPUs, for which the plan is."""
    p = config.parallel
    if p.zero_stage == 0 or world_size == p.tp * p.pp:
        return config
    return replace(config, deepspeed=merged({"zero_optimization": {"overlap_comm": True}}, config.deepspeed))


def play(
    make: Callable[[], tuple[Recipe, Any]], rank: int, world_size: int, *, towers: AbstractSet[str],
    terms: Mapping[str, int], fused_norms: bool = False,
) -> Played:
    """Set up a run as one rank of a world and train; all is real but the data and the other ranks.

    Args:
        make: called in that world; gives a recipe that is open, and its batch of a step, of tensors without data.
        towers: those that any rank trains, by the names in the optimizer's groups.
        terms: the number of loss terms of each pass, which only the last pipeline rank computes.
        fused_norms: see ``parallel.rehearsal``. Nothing is compiled; regions that would be there hold and make what
            compiled ones do.
    """
    print("setting up and playing two steps; large models take minutes ...", file=sys.stderr, flush=True)
    seconds: dict[str, float] = {}
    start = process_time()

    def done(part: str) -> None:
        nonlocal start
        seconds[part], start = process_time() - start, process_time()

    with rehearsed_rank(rank, world_size, towers, fused_norms=fused_norms) as live:
        start = process_time()  # DeepSpeed is imported
        recipe, batch = make()
        before = live.now
        done("groups")
        with patch.object(recipe, "compile", partial(count_regions, recipe.config.parallel.compile, fused_norms)):
            recipe.build()
        done("model and engine")
        mesh, engine, passes = recipe.mesh, recipe.engine, recipe.passes()
        if not mesh.is_last_stage:
            for one in passes:
                one.term_names = tuple(map(str, range(terms[one.name])))
        for _ in range(_STEPS):
            with count_traffic(mesh) as traffic:
                _, result = train_step(
                    engine, passes, batch, averaged=recipe.averaged(), follow=recipe.follow(batch.step),
                    lr_of=lambda group: group["lr_scale"],
                )
            assert result.applied, "in a rehearsal every number is finite"
            done("step")
        peak = live.peak - before
        blocks = {
            name: module.stripe.blocks for name, module in engine.module.named_modules()
            if isinstance(getattr(module, "stripe", None), Stripe)
        }
        groups = {axis: members(mesh, axis) for axis in AXES}
        engine.close()
    return Played(mesh, groups, blocks, peak, Traffic(t for t in traffic if t.ranks > 1), seconds)


@dataclass(frozen=True)
class Rehearsed:
    """A play beside what is planned: bytes by (axis, operation), and the most bytes at one time."""

    played: Played
    sent: Sent
    memory: float

    def agrees(self) -> bool:
        """Tell whether the planned bytes are those of the play, and the memory within 10 %."""
        return self.played.traffic.sent == self.sent and abs(self.memory / self.played.peak - 1) <= _CLOSE

    def page(self) -> str:
        """Return what a user reads of it."""
        played, mesh, sent = self.played, self.played.mesh, self.played.traffic.sent
        groups = [f"{axis} {_spans(ranks)}" for axis, ranks in played.groups.items() if len(ranks) > 1]
        rows = [("axis", "operation", "messages", "bytes", "planned")]
        for kind, count in sorted(played.traffic.messages.items()):
            rows.append((*kind, f"{count:,}", f"{sent[kind]:,}", f"{self.sent[kind]:,}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join([
            f"rank        {mesh.rank:,} of {mesh.world_size:,}: tp {mesh.tp_rank} of {mesh.tp}, pp {mesh.pp_rank} of "
            f"{mesh.pp}, dp {mesh.dp_rank} of {mesh.dp}",
            f"groups      {'; '.join(groups) or 'none'}",
            f"blocks      {'; '.join(f'{name} {_spans(blocks)}' for name, blocks in played.blocks.items())}",
            f"one core    {', '.join(f'{part} {time:.2f} s' for part, time in played.seconds.items())}",
            f"memory      {played.peak / GIB:.3f} GiB at most, planned {self.memory / GIB:.3f}",
            "sent in a step",
            *("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows),
        ])


def _spans(numbers: list[int]) -> str:
    """Write numbers in order: 0-3 8-11 for runs of neighbours, 5 37 ... 997 for many that are not neighbours."""
    spans = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    written = [f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans]
    return " ".join(written if len(written) <= 4 else [*written[:2], "...", written[-1]]) or "none"
