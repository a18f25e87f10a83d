"""Collectives, with and without gradients. Each is the identity on an axis of size 1."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megavtp.errors import UserError
from megavtp.parallel.mesh import Axis, Mesh

T = TypeVar("T")
# These take one tensor and give one, which NCCL does without copies. They have new names since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def all_reduce(x: Tensor, mesh: Mesh, axis: Axis, op: Literal["sum", "max"] = "sum") -> Tensor:
    """Reduce over ``axis`` into a new tensor; no gradient flows."""
    return begin_all_reduce(x, mesh, axis, op)()


def begin_all_reduce(x: Tensor, mesh: Mesh, axis: Axis, op: Literal["sum", "max"] = "sum") -> Callable[[], Tensor]:
    """Begin ``all_reduce``; what is returned waits for it and gives its result."""
    group = mesh.group(axis)
    x = x.detach()
    if group is None:
        return lambda: x
    x = x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(x, _OPS[op], group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return x

    return result


def all_gather(x: Tensor, mesh: Mesh, axis: Axis) -> Tensor:
    """Concatenate the ranks' equally shaped ``x`` (n, ...) along dim 0 to (size * n, ...); no gradient flows."""
    group = mesh.group(axis)
    x = x.detach()
    if group is None:
        return x
    whole = x.new_empty(mesh.size(axis) * x.shape[0], *x.shape[1:])
    _all_gather(whole, x.contiguous(), group=group)
    return whole


def reduce_scatter(x: Tensor, mesh: Mesh, axis: Axis) -> Tensor:
    """Sum ``x`` (size * n, ...) over ``axis`` and keep this rank's (n, ...) of it; no gradient flows."""
    group = mesh.group(axis)
    x = x.detach()
    if group is None:
        return x
    own = x.new_empty(x.shape[0] // mesh.size(axis), *x.shape[1:])
    _reduce_scatter(own, x.contiguous(), group=group)
    return own


def gather_pieces(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return the equally shaped ``x`` of all ranks of ``group``, in rank order; no gradient flows."""
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return pieces


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        # A plain attribute of the context: saved tensors would come after a matrix product, and recomputation, which
        # ends with the last saved tensor, would have to repeat that product too.
        ctx.of_gradient = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.of_gradient(grad), None, None


def with_gradient(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``forward(x)``; the gradient of x is ``backward`` of the result's gradient."""
    return _Pair.apply(x, forward, backward)


def copy_to_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Enter a tensor-parallel region: identity forward, gradient summed over tp (Megatron's f)."""
    return x if mesh.tp == 1 else with_gradient(x, lambda x: x, lambda grad: all_reduce(grad, mesh, "tp"))


def reduce_from_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Leave a tensor-parallel region: sum over tp forward, identity gradient (Megatron's g)."""
    return x if mesh.tp == 1 else with_gradient(x, lambda x: all_reduce(x, mesh, "tp"), lambda grad: grad)


def _own_slice(x: Tensor, mesh: Mesh) -> Tensor:
    return x.chunk(mesh.tp, -1)[mesh.tp_rank].contiguous()


def _all_slices(x: Tensor, mesh: Mesh) -> Tensor:
    return torch.cat(gather_pieces(x, mesh.tp_group), -1)


def scatter_to_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Keep this rank's slice of the last dimension; the gradient is gathered."""
    return x if mesh.tp == 1 else with_gradient(x, lambda x: _own_slice(x, mesh), lambda grad: _all_slices(grad, mesh))


def gather_from_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Join the ranks' slices along the last dimension, the inverse of ``scatter_to_tp``.

    What follows must be the same on every rank: each keeps its own slice of the gradient.
    """
    return x if mesh.tp == 1 else with_gradient(x, lambda x: _all_slices(x, mesh), lambda grad: _own_slice(grad, mesh))


class _GatherFromDp:
    """A gather over dp under way: forward that of the rows, backward the sum of their gradients on the rank of each."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def begin(self, x: Tensor) -> Tensor:
        whole = x.new_empty(self._mesh.dp * x.shape[0], *x.shape[1:])
        self._work = _all_gather(whole, x.contiguous(), group=self._mesh.dp_group, async_op=True)
        return whole

    def wait(self, whole: Tensor) -> Tensor:
        self._work.wait()
        return whole

    def begin_backward(self, grad: Tensor) -> Tensor:
        self._own = grad.new_empty(grad.shape[0] // self._mesh.dp, *grad.shape[1:])
        self._work = _reduce_scatter(self._own, grad.contiguous(), group=self._mesh.dp_group, async_op=True)
        return grad  # autograd wants a gradient of this shape; nobody reads it

    def wait_backward(self, _: Tensor) -> Tensor:
        self._work.wait()
        return self._own


def begin_gather_from_dp(x: Tensor, mesh: Mesh) -> Callable[[], Tensor]:
    """Begin ``gather_from_dp``; what is returned waits for it and gives its result.

    The backward goes the other way: it begins where the result was asked for, and is waited for where the gather began.
    So what is computed between the two hides the gather, and its own backward hides the sum of the gradients.
    """
    if mesh.dp == 1:
        return lambda: x
    gather = _GatherFromDp(mesh)
    whole = with_gradient(x, gather.begin, gather.wait_backward)
    return lambda: with_gradient(whole, gather.wait, gather.begin_backward)


def gather_from_dp(x: Tensor, mesh: Mesh) -> Tensor:
    """Concatenate (n, ...) over dp to (dp * n, ...), differentiably.

    The gradient of a row is the *sum* of all ranks' gradients of it. With a loss that is the mean over own rows, and
    an engine that averages over dp, parameters get the exact gradient of the global mean.
    """
    return begin_gather_from_dp(x, mesh)()


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None, source: int = 0) -> Any:
    """Return rank ``source``'s ``value`` (small, picklable) on every rank of ``group``; None is the world."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, group=group, group_src=source)
    return holder[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's ``value`` (small, picklable), in rank order, on every rank of the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_first() -> bool:
    """Tell whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def together(work: Callable[[], T]) -> T:
    """Return ``work()`` once every rank has done its own.

    An error on one rank alone (a disk that only its machine lacks) would leave the others waiting for it in the next
    collective. So the ``UserError`` of the first rank that has one is raised on all ranks.
    """
    error: str | None = None
    try:
        result = work()
    except UserError as raised:
        error = str(raised)
    first = next((text for text in all_gather_object(error) if text is not None), None)
    if first is not None:
        raise UserError(first)
    return result
