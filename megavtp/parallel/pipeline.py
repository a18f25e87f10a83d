"""How a pass runs over the pipeline ranks: each does its operations in its order and passes activations on.

With one pipeline rank the whole pass is one stage, and the same loop is a plain forward and backward per micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megavtp.parallel.mesh import Mesh
from megavtp.parallel.messages import Messages, broadcast_last_stage, broadcast_last_stage_object
from megavtp.parallel.orders import Op, Schedule, forward_order, one_by_one, train_order
from megavtp.parallel.striping import ActivationSpec

Inputs = Callable[[int, bool], dict[str, Any]]
"""(micro-batch, whether for the first stage) -> keyword inputs of a stage; later ones read no pixels, only shapes."""


class Striped(Protocol):
    """A model that can be cut over pipeline ranks: it says how a pass goes through the towers' chunks."""

    def legs(self, mode: str) -> int: ...

    def activation_specs(self, mode: str, stage: int, **inputs: Any) -> list[ActivationSpec]: ...


class Runner(Striped, Protocol):
    """What executes a pass: an ``Engine``, or in tests a plain module. With one pipeline rank only ``mesh``, the call
    and ``backward`` are used; with more, the call takes ``stage`` and ``activations`` too. ``announce_last_backward``
    is called where ``execute`` is told of the last pass of a step. ``may_wait`` says whether the host may have to wait
    for the device in this pass, with a graph or without; ``has_run`` is told of each pass that has run."""

    mesh: Mesh
    schedule: Schedule
    device: torch.device

    def __call__(self, mode: str, **inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...

    def announce_last_backward(self) -> None: ...

    def may_wait(self, mode: str, with_graph: bool) -> bool: ...

    def has_run(self, mode: str, with_graph: bool) -> None: ...


class _Seed(torch.autograd.Function):
    """A scalar zero whose backward is that of ``outputs`` with ``gradients``, which it uses up: a stage's part of the
    backward of a later loss. Called with the number of outputs, the outputs and their gradients."""

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.gradients = tensors[count:]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        return None, *(gradient.mul_(upstream) for gradient in ctx.gradients), *(None for _ in ctx.gradients)


class _Trip:
    """A pass under way on this rank.

    Args:
        order_of: (pipeline ranks, rank, chunks of the pass on a rank) -> the operations of that rank in order.

    Attributes:
        held: what came in and what came out of the forwards that wait for their backward, by (stage, micro-batch).
    """

    def __init__(self, run: Runner, mode: str, inputs: Inputs, order_of: Callable[[int, int, int], list[Op]]):
        self.run, self.mode, self.inputs, self.mesh = run, mode, inputs, run.mesh
        chunks, device = 1, None
        if self.mesh.pp > 1:
            chunks, device = run.legs(mode) * self.mesh.virtual_stages, run.device
        orders = [order_of(self.mesh.pp, rank, chunks) for rank in range(self.mesh.pp)]
        # A device that is receiving ahead is not done before the sender is, which may need what this rank has not
        # launched yet: a host that waits for it would do so for ever.
        self.with_graph = torch.is_grad_enabled()
        self.ahead = self.mesh.pp == 1 or not run.may_wait(mode, self.with_graph)
        if not self.ahead:
            orders = [one_by_one(order) for order in orders]
        self.order, self.stages = orders[self.mesh.pp_rank], chunks * self.mesh.pp
        # The micro-batches of a pass are alike.
        specs = cache(lambda stage: run.activation_specs(mode, stage, **inputs(0, False)))
        self.messages = Messages(self.mesh, device, orders, self.stages, specs)
        self.held: dict[tuple[int, int], tuple[list[Tensor], Any]] = {}

    def operations(self) -> Iterator[Op]:
        """Yield this rank's operations in order; what the next one needs begins to arrive before it is asked for."""
        for op, following in zip(self.order, [*self.order[1:], None]):
            self.messages.post(op)
            if following is not None and self.ahead:
                self.messages.post(following)
            yield op
        self.messages.finish()
        if self.mesh.pp > 1:
            self.run.has_run(self.mode, self.with_graph)

    def forward(self, op: Op) -> tuple[list[Tensor], Any, bool]:
        """Return the activations that came in, what came out, and whether that is the result of the pass."""
        activations = self.messages.take(op)
        if torch.is_grad_enabled():
            activations = [x.requires_grad_() for x in activations]
        inputs = self.inputs(op.micro, op.stage == 0)
        if self.mesh.pp > 1:
            inputs |= {"stage": op.stage, "activations": activations}
        out = self.run(self.mode, **inputs)
        is_last = op.stage == self.stages - 1
        if not is_last:
            self.messages.send(op, out)
        return activations, out, is_last

    def backward(self, op: Op) -> None:
        activations, out = self.held.pop((op.stage, op.micro))
        if op.stage == self.stages - 1:
            self.run.backward(out)
        else:
            gradients = self.messages.take(op)
            # An empty chunk returned its input. DeepSpeed fails in a backward that meets no parameter (ZeRO-2).
            if len(activations) == len(out) and all(a is b for a, b in zip(activations, out)):
                self.messages.send(op, gradients)
                return
            self.run.backward(_Seed.apply(len(out), *out, *gradients))
        if activations:
            # ``send`` notices if one is None.
            self.messages.send(op, [x.grad for x in activations if x.grad is not None])


@torch.no_grad()
def forward(run: Runner, mode: str, inputs: Inputs, micro_batches: int) -> list[Any]:
    """Run forwards without graph; return the results by micro-batch on the last pipeline rank, on the others none."""
    trip = _Trip(run, mode, inputs, partial(forward_order, m=micro_batches))
    done = (trip.forward(op) for op in trip.operations())
    return [out for _, out, is_last in done if is_last]


def forward_everywhere(
    run: Runner, mode: str, inputs: Inputs, micro_batches: int, spec: Callable[[], ActivationSpec]
) -> list[Tensor]:
    """Run ``forward`` of a pass whose result is one tensor, and give it to every pipeline rank; ``spec``: its shape and
    dtype."""
    results = forward(run, mode, inputs, micro_batches)
    if run.mesh.pp == 1:
        return results
    shape, dtype = spec()
    assert all((tuple(x.shape), x.dtype) == (shape, dtype) for x in results), (results[0].shape, shape, dtype)
    return _on_all_stages(run, results, [(shape, dtype)] * micro_batches)


def _on_all_stages(run: Runner, tensors: list[Tensor], specs: Sequence[ActivationSpec]) -> list[Tensor]:
    """Return the last pipeline rank's ``tensors`` on every one; ``specs``: their shapes and dtypes."""
    if not run.mesh.is_last_stage:
        tensors = [torch.empty(shape, dtype=dtype, device=run.device) for shape, dtype in specs]
    return [broadcast_last_stage(x.contiguous(), run.mesh) for x in tensors]


def train(
    run: Runner, mode: str, inputs: Inputs, micro_batches: int, loss: Callable[[Any, int], Tensor],
    ends_step: bool = False,
) -> None:
    """Run forward and backward of all micro-batches; ``loss``: (result, micro-batch) -> scalar, on the last rank.

    ``ends_step``: no other pass of the step follows.
    """
    schedule = run.schedule if run.mesh.pp > 1 else "1f1b"
    trip = _Trip(run, mode, inputs, partial(train_order, schedule, m=micro_batches))
    for op in trip.operations():
        if op.kind == "F":
            activations, out, is_last = trip.forward(op)
            trip.held[op.stage, op.micro] = activations, loss(out, op.micro) if is_last else out
        else:
            if ends_step and op is trip.order[-1]:
                run.announce_last_backward()
            trip.backward(op)


def infer(run: Runner, mode: str, **inputs: Any) -> Any:
    """Return the result of a forward-only pass, one tensor or several, on every pipeline rank. For evaluation: the
    host waits."""
    results = forward(run, mode, lambda micro, first: dict(inputs), 1)
    if run.mesh.pp == 1:
        return results[0]
    result: Any = results[0] if results else ()
    alone = isinstance(result, Tensor)
    tensors = [result] if alone else list(result)
    alone, specs = broadcast_last_stage_object((alone, [(x.shape, x.dtype) for x in tensors]), run.mesh)
    tensors = _on_all_stages(run, tensors, specs)
    return tensors[0] if alone else tuple(tensors)
