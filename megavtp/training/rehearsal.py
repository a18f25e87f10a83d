"""The whole step of a run, played by one rank of a large world without data, without the other ranks or their memory."""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from megavtp.parallel.mesh import Mesh
from megavtp.parallel.rehearsal import rehearsed_rank
from megavtp.parallel.striping import Stripe
from megavtp.parallel.traffic import Traffic, count_traffic
from megavtp.training.recipe import Recipe
from megavtp.training.step import train_step

_STEPS = 2  # the first makes what stays, such as moments


@dataclass(frozen=True)
class Played:
    """What one rank held and did.

    Attributes:
        stripes: the numbers of the blocks on the rank, by the name of the tower in the model.
        peak: the most bytes at one time, from before the model is built to the end of the last step.
        sent: what the rank took part in sending in the last step.
        seconds: how long each part of the play took on this machine.
    """

    mesh: Mesh
    stripes: Mapping[str, list[int]]
    peak: int
    sent: Traffic
    seconds: Mapping[str, float]


def play(
    make: Callable[[], tuple[Recipe, Any]], rank: int, world_size: int, *, towers: AbstractSet[str],
    terms: Mapping[str, int], fused_norms: bool = False,
) -> Played:
    """Set up a run as one rank of a world and train; everything is real but the data and the other ranks.

    Args:
        make: called in that world; gives a recipe that is open, and its batch of a step, of tensors without data.
        towers: those that any rank trains, by the names that the optimizer's groups have.
        terms: the number of loss terms of each pass, which only the last pipeline rank computes.
        fused_norms: see ``parallel.rehearsal``.
    """
    seconds: dict[str, float] = {}

    def done(part: str) -> None:
        nonlocal start
        seconds[part], start = perf_counter() - start, perf_counter()

    with rehearsed_rank(rank, world_size, towers, fused_norms=fused_norms) as live:
        start = perf_counter()
        recipe, batch = make()
        before = live.now
        done("groups")
        recipe.build()
        done("model and engine")
        engine, passes = recipe.engine, recipe.passes()
        if not recipe.mesh.is_last_stage:
            for one in passes:
                one.term_names = tuple(f"{number}" for number in range(terms[one.name]))
        for _ in range(_STEPS):
            with count_traffic(recipe.mesh) as sent:
                _, result = train_step(
                    engine, passes, batch, averaged=recipe.averaged(), follow=recipe.follow(batch.step),
                    lr_of=lambda group: group["lr_scale"],
                )
            assert result.applied, "in a rehearsal every number is finite"
            done("step")
        stripes = {
            name: module.stripe.blocks for name, module in engine.module.named_modules()
            if isinstance(getattr(module, "stripe", None), Stripe)
        }
        peak = live.peak - before
        engine.close()
    return Played(recipe.mesh, stripes, peak, Traffic(t for t in sent if t.ranks > 1), seconds)
