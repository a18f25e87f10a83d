"""The gradient norm over all ranks, in total and by tower, and whether a step is skipped because it is not finite.

It is computed here in every ZeRO stage. DeepSpeed counts replicated parameters more than once, does not know that
pipeline stages hold different parameter groups, and converts each gradient to float64 first, which takes time and
memory. See ``deepspeed_adapter`` for the version of DeepSpeed and the tests.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavtp.parallel.collectives import all_gather_object
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.sharding import shard_of

ROW = 2**16  # elements whose squares are summed in one go on a CPU


def install(engine: Any, mesh: Mesh) -> None:
    """Let the engine compute the norm as this file says, whatever its ZeRO stage."""
    # Pipeline ranks have different parameter groups: a head is on the last one only.
    towers = {group["tower"] for group in engine.optimizer.param_groups if "tower" in group}
    engine.megavtp_tower_norms = dict.fromkeys(sorted(set().union(*all_gather_object(towers))))
    forget(engine)
    if engine.zero_optimization_stage() == 0:
        own_stage0_norm(engine, mesh)
    else:
        own_norm_of_partitions(engine, mesh)


def forget(engine: Any) -> None:
    """Drop the towers' norms of the step before."""
    nothing = torch.full((), torch.nan, device=engine.device)
    engine.megavtp_tower_norms = dict.fromkeys(engine.megavtp_tower_norms, nothing)


def own_stage0_norm(engine: Any, mesh: Mesh) -> None:
    """Make stage 0 report the gradient norm and skip a non-finite step, where it would clip; alone it does neither."""
    inner_step = engine.optimizer.step
    engine.optimizer.overflow = False

    def clip(max_norm: float) -> None:
        groups = [[p for p in group["params"] if p.grad is not None] for group in engine.optimizer.param_groups]
        owned = [[p.grad for p in group if counts(p, mesh)] for group in groups]
        norm = _total_norm(engine, mesh, owned, range(len(groups)))
        gradients = [p.grad for group in groups for p in group]
        engine.optimizer._global_grad_norm = norm
        engine.optimizer.overflow = bool(norm.isinf())  # the host reads this once, as in the other stages
        if max_norm > 0 and not engine.optimizer.overflow:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))

    def step(*args, **kwargs):
        if not engine.optimizer.overflow:
            inner_step(*args, **kwargs)

    engine.optimizer.step = step
    engine.clip_fp32_gradients = lambda: clip(engine.megavtp_clip_grad)


def own_norm_of_partitions(engine: Any, mesh: Mesh) -> None:
    """Make stages 1 to 3 take the norm of the parts of the gradients that this rank keeps, and sum over all ranks."""
    optimizer = engine.optimizer
    stage3 = engine.zero_optimization_stage() == 3
    # Stage 3 splits parameter groups.
    of_group = optimizer.sub_group_to_group_id if stage3 else range(len(optimizer.bit16_groups))

    def norm() -> Tensor:
        parameters = optimizer.fp16_groups if stage3 else optimizer.params_in_partition
        owned = [
            [part for part, p in zip(optimizer.averaged_gradients[index], group) if counts(p, mesh)]
            for index, group in enumerate(parameters)
        ]
        return _total_norm(engine, mesh, owned, of_group, over_dp=True)

    if stage3:
        optimizer._get_norm_groups = lambda: [norm()]
    else:
        optimizer.scaled_global_norm = norm
        optimizer.unscale_and_clip_grads = lambda gradients, norm: _clip(optimizer, gradients, norm)


def counts(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Tell whether this rank counts a parameter in the norm: a tensor-parallel slice counts on every tensor-parallel
    rank, a replicated parameter on one."""
    return shard_of(parameter) is not None or mesh.tp_rank == 0


def _clip(optimizer: Any, gradients: list[Tensor], norm: Tensor) -> None:
    """Clip a parameter group's gradients as stages 1 and 2 do, without their asking the host once more for each group
    whether the norm is finite: a step whose norm is not has ended before."""
    if optimizer.clip_grad > 0:
        excess = (norm / optimizer.loss_scale + 1e-6) / optimizer.clip_grad
        torch._foreach_mul_(gradients, 1.0 / (excess.clamp(min=1.0) * optimizer.loss_scale))


def _total_norm(
    engine: Any, mesh: Mesh, owned: Sequence[Sequence[Tensor]], of_group: Mapping[int, int] | range,
    over_dp: bool = False,
) -> Tensor:
    """Return the norm of the gradients that all ranks own; keep the towers' norms on the engine.

    ``of_group`` gives the parameter group of each list of ``owned``. ``over_dp``: data-parallel ranks own different
    parts. A total that is not finite is returned as infinity.
    """
    groups, towers = engine.optimizer.param_groups, list(engine.megavtp_tower_norms)
    squares = torch.zeros(len(towers) + 1, dtype=torch.float32, device=engine.device)  # the last: groups of no tower
    for index, gradients in enumerate(owned):
        tower = groups[of_group[index]].get("tower")
        if gradients:
            squares[len(towers) if tower is None else towers.index(tower)] += square(gradients)
    for group in (mesh.group("dp") if over_dp else None, mesh.mp_group):
        if group is not None:
            dist.all_reduce(squares, group=group)
    engine.megavtp_tower_norms = dict(zip(towers, squares[:-1].sqrt().unbind()))
    norm = squares.sum().sqrt()
    return torch.where(norm.isfinite(), norm, torch.inf)


def square(tensors: Sequence[Tensor]) -> Tensor:
    """Return the square of the norm of all tensors together, a scalar.

    On a CPU torch adds up the float32 squares of a tensor in few sums: for 19 million elements these were wrong in the
    third digit. Rows of ``ROW`` elements have an error below 1e-6.
    """
    rest, norms = [], []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        cut = flat.numel() // ROW * ROW if flat.device.type == "cpu" else 0
        if cut:
            norms.append(torch.linalg.vector_norm(flat[:cut].view(-1, ROW), dim=1))
        if cut < flat.numel():
            rest.append(flat[cut:])
    if rest:
        norms.append(torch.stack(torch._foreach_norm(rest)))
    if not norms:
        return tensors[0].new_zeros(())
    return torch.linalg.vector_norm(norms[0] if len(norms) == 1 else torch.cat(norms)).square()


def of_step(engine: Any) -> tuple[bool, Tensor | float, dict[str, Tensor]]:
    """Tell whether the last step was applied, its global gradient norm before clipping, and that of each tower.

    A step is skipped if the norm is not finite. A tower's norm is NaN where it was not finite, or where the step was
    given up before it was computed.
    """
    applied = not getattr(engine.optimizer, "overflow", False)
    return applied, engine.optimizer._global_grad_norm, engine.megavtp_tower_norms
