"""Plans as text: a table, where memory and time go, and the lines to paste into a recipe."""

from collections.abc import Mapping, Sequence

import yaml

from megavtp.config.run import ParallelConfig
from megavtp.config.share import share
from megavtp.config.sizes import ResolvedConfig
from megavtp.planning.flops import flops_per_step
from megavtp.planning.plan import GIB, Plan
from megavtp.planning.search import Search

_SHORT = {"contrastive": "pairs", "self_distillation": "ssl", "reconstruction": "rec"}


def model_lines(config: ResolvedConfig, counts: Mapping[str, int]) -> list[str]:
    """Return lines with the parameters of each tower and the model FLOPs of each objective."""
    flops, batches = flops_per_step(config), {name: part.batch for name, part in share(config, 1).passes.items()}
    each = ", ".join(f"{name} {flops[name] / batch / 1e12:.3g}" for name, batch in batches.items())
    return [
        f"parameters  {', '.join(f'{name} {count / 1e6:.1f} M' for name, count in counts.items())}",
        f"TFLOP       {each} per image; {flops['total'] / 1e12:,.0f} per step",
    ]


def table(plans: Sequence[Plan]) -> str:
    """Return a line for each plan: layout, micro-batches, memory of the fullest rank, least time of a step by cause."""
    cells = [_cells(plan) for plan in plans]
    rows = [list(cells[0]), *(list(row.values()) for row in cells)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _cells(plan: Plan) -> dict[str, str]:
    p, full, seconds = plan.config.parallel, plan.fullest, plan.seconds
    stage = p.zero_on(plan.dp)
    schedule = "-" if p.pp == 1 else p.schedule + (f" x{p.virtual_stages}" if p.virtual_stages > 1 else "")
    bubble = seconds["bubble"] / seconds["products"] if seconds["products"] else 0.0
    return {
        "tp": str(p.tp), "pp": str(p.pp), "dp": str(plan.dp), "schedule": schedule,
        "zero": f"{stage} step" if p.zero3_gather == "step" else str(stage),
        "recompute": p.recompute, "seq": "on" if p.sequence_parallel else "-",
        **{f"m {_SHORT[name]}": str(part.micro_batch) for name, part in share(plan.config, plan.dp).passes.items()},
        "GiB": f"{plan.memory / GIB:.1f}", "state": f"{full.state.total / GIB:.1f}",
        "activ.": f"{full.activations / GIB:.1f}", "s/step": f"{plan.step_seconds:.2f}",
        "bubble": f"{100 * bubble:.0f} %", **{f"{axis} s": f"{seconds[axis]:.3f}" for axis in ("tp", "pp", "dp")},
    }


def details(plan: Plan) -> str:
    """Show where one plan's memory, traffic and time go."""
    full = plan.fullest
    lasting = ("weights", "gradients", "optimizer", "teacher", "buffers")
    state = ", ".join(f"{name} {getattr(full.state, name) / GIB:.2f}" for name in lasting)
    activations = ", ".join(f"{name} {cost.peak / GIB:.2f}" for name, cost in full.passes.items())
    sent = ", ".join(f"{axis} {op} {size / GIB:.3f}" for (axis, op), size in sorted(full.sent.items()))
    hours = plan.config.train.steps * plan.step_seconds / 3600
    return "\n".join([
        f"memory of the fullest rank (pipeline rank {full.pp_rank}), GiB",
        f"  {state}",
        f"  activations: {activations}",
        "sent by that rank in a step, GiB of payload",
        f"  {sent or 'nothing'}",
        "least time of a step, s",
        "  " + ", ".join(f"{name} {time:.3f}" for name, time in plan.seconds.items()),
        f"  {plan.step_seconds:.2f} in all: a bound, at full rate in everything; {hours:,.0f} h for "
        f"{plan.config.train.steps:,} steps",
    ])


def yaml_lines(plan: Plan) -> str:
    """Return the keys of a plan, to be pasted into a recipe."""
    p = plan.config.parallel
    keys = ["tp", "pp", "zero_stage", "recompute"]
    if p.pp > 1:
        keys.append("schedule")
    more = ("virtual_stages", "zero3_gather", "sequence_parallel")
    keys += [key for key in more if getattr(p, key) != getattr(ParallelConfig, key)]  # where it is not the default
    parallel = {key: getattr(p, key) for key in keys}
    sizes = {name: {"micro_batch": part.micro_batch} for name, part in share(plan.config, plan.dp).passes.items()}
    return yaml.safe_dump({"objectives": sizes, "parallel": parallel}, sort_keys=False).rstrip()


def nothing_fits(found: Search, memory: float, budget: float) -> str:
    """Say why there is no plan, and which one comes closest."""
    if found.closest is None:
        return "no legal layout: " + "; ".join(reason for reason, _ in found.refused.most_common(3))
    closest, full = found.closest, found.closest.fullest
    if full.activations > full.state.total:
        largest = "activations"
        more = "smaller micro-batches, more streams' worth of GPUs, or a smaller prototype chunk"
    else:
        largest, more = "weights, gradients, moments and teacher", "a larger model-parallel part or more GPUs"
    return (
        f"nothing fits: of {memory:g} GiB a run may use {budget / GIB:.1f}, the closest layout needs "
        f"{closest.memory / GIB:.1f}, most of it {largest}: try {more}"
    )
