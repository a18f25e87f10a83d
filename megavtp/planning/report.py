"""Plans as text: a table, where memory and time go, and the lines to paste into a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

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
    sizes = [f"m {_SHORT[name]}" for name in share(plans[0].config, 1).passes]
    header = [
        "tp", "pp", "dp", "schedule", "zero", "recompute", "seq", *sizes, "GiB", "state", "activ.", "s/step", "bubble",
        "tp s", "pp s", "dp s",
    ]
    rows = [header, *(_row(plan) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _row(plan: Plan) -> list[str]:
    p, full, seconds = plan.config.parallel, plan.fullest, plan.seconds
    schedule = "-" if p.pp == 1 else p.schedule + (f" x{p.virtual_stages}" if p.virtual_stages > 1 else "")
    bubble = seconds["bubble"] / seconds["products"] if seconds["products"] else 0.0
    sizes = [str(part.micro_batch) for part in share(plan.config, plan.dp).passes.values()]
    zero = f"{p.zero_stage} step" if p.zero3_gather == "step" else str(p.zero_stage)
    return [
        str(p.tp), str(p.pp), str(plan.dp), schedule, zero, p.recompute,
        "on" if p.sequence_parallel else "-", *sizes, f"{plan.memory / GIB:.1f}", f"{full.state.total / GIB:.1f}",
        f"{full.activations / GIB:.1f}", f"{plan.step_seconds:.2f}", f"{100 * bubble:.0f} %",
        *(f"{seconds[axis]:.3f}" for axis in ("tp", "pp", "dp")),
    ]


def details(plan: Plan) -> str:
    """Show where one plan's memory, traffic and time go."""
    full, state = plan.fullest, plan.fullest.state
    parts = {
        "weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer,
        "teacher": state.teacher, "buffers": state.buffers,
    }
    lines = [f"memory of the fullest rank (pipeline rank {full.pp_rank}), GiB"]
    lines.append("  " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()))
    lines.append("  activations: " + ", ".join(f"{n} {cost.peak / GIB:.2f}" for n, cost in full.passes.items()))
    lines.append("sent by that rank in a step, GiB of payload")
    sent = sorted(full.sent.items())
    lines.append("  " + (", ".join(f"{axis} {op} {size / GIB:.3f}" for (axis, op), size in sent) or "nothing"))
    lines.append("least time of a step, s")
    lines.append("  " + ", ".join(f"{name} {time:.3f}" for name, time in plan.seconds.items()))
    hours = plan.config.train.steps * plan.step_seconds / 3600
    lines.append(
        f"  {plan.step_seconds:.2f} in all: a bound, at full rate in everything; {hours:,.0f} h for "
        f"{plan.config.train.steps:,} steps"
    )
    return "\n".join(lines)


def yaml_lines(plan: Plan) -> str:
    """Return the keys of a plan, to be pasted into a recipe."""
    p = plan.config.parallel
    parallel: dict[str, Any] = {"tp": p.tp, "pp": p.pp, "zero_stage": p.zero_stage, "recompute": p.recompute}
    if p.pp > 1:
        parallel["schedule"] = p.schedule
        if p.virtual_stages > 1:
            parallel["virtual_stages"] = p.virtual_stages
    if p.zero3_gather == "step":
        parallel["zero3_gather"] = "step"
    if p.sequence_parallel:
        parallel["sequence_parallel"] = True
    sizes = {name: {"micro_batch": part.micro_batch} for name, part in share(plan.config, plan.dp).passes.items()}
    return yaml.safe_dump({"objectives": sizes, "parallel": parallel}, sort_keys=False).rstrip()


def nothing_fits(found: Search, memory: float, budget: float) -> str:
    """Say why there is no plan, and which one comes closest."""
    if found.closest is None:
        reasons = sorted(found.refused, key=found.refused.__getitem__, reverse=True)[:3]
        return "no legal layout: " + "; ".join(reasons)
    closest = found.closest
    state, more = closest.fullest.state, "a larger model-parallel part or more GPUs"
    largest = "activations" if closest.fullest.activations > state.total else "weights, gradients, moments and teacher"
    if largest == "activations":
        more = "smaller micro-batches, more streams' worth of GPUs, or a smaller prototype chunk"
    return (
        f"nothing fits: of {memory:g} GiB a run may use {budget / GIB:.1f}, the closest layout needs "
        f"{closest.memory / GIB:.1f}, most of it {largest}: try {more}"
    )
