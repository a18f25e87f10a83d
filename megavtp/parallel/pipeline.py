"""How a pass runs over the pipeline ranks: each does its operations in its order and passes activations on.

With one pipeline rank the whole pass is one stage, and the same loop is a plain forward and backward per micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megavtp.parallel.mesh import Mesh
from megavtp.parallel.messages import Messages, broadcast_last_stage, broadcast_last_stage_object
from megavtp.parallel.orders import Op, Schedule, forward_order, train_order
from megavtp.parallel.striping import ActivationSpec

Inputs = Callable[[int, bool], dict[str, Any]]
"""(micro-batch, whether for the first stage) -> keyword inputs of a stage; later ones read no pixels, only shapes."""


class Striped(Protocol):
    """A model that can be cut over pipeline ranks: it says how a pass goes through the towers' chunks."""

    def legs(self, mode: str) -> int: ...

    def activation_specs(self, mode: str, stage: int, **inputs: Any) -> list[ActivationSpec]: ...


class Runner(Striped, Protocol):
    """What executes a pass: an ``Engine``, or in tests a plain module. With one pipeline rank only ``mesh``, the call
    and ``backward`` are used; with more, the call takes ``stage`` and ``activations`` too."""

    mesh: Mesh
    schedule: Schedule
    device: torch.device

    def __call__(self, mode: str, **inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...


class _Seed(torch.autograd.Function):
    """A scalar whose backward puts given gradients on tensors: a stage's part of the backward of a later loss."""

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.gradients = tensors[count:]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        return None, *(gradient.mul_(upstream) for gradient in ctx.gradients), *(None for _ in ctx.gradients)


def seed(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar zero; its backward is that of ``outputs`` with ``gradients``, which it uses up."""
    return _Seed.apply(len(outputs), *outputs, *gradients)


@dataclass
class _Trip:
    """A pass under way on this rank."""

    run: Runner
    mode: str
    inputs: Inputs
    orders: list[list[Op]]
    held: dict[tuple[int, int], tuple[list[Tensor], Any]] = field(default_factory=dict)  # graphs waiting for a backward
    specs: dict[int, list[ActivationSpec]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mesh = self.run.mesh
        self.single = mesh.pp == 1
        self.stages = 1 if self.single else self.run.legs(self.mode) * mesh.chunks
        self.order = self.orders[mesh.pp_rank]
        device = None if self.single else self.run.device
        self.messages = Messages(mesh, device, self.orders, self.stages, self._specs_of)

    def _specs_of(self, stage: int) -> list[ActivationSpec]:
        if stage not in self.specs:  # the micro-batches of a pass are alike
            self.specs[stage] = self.run.activation_specs(self.mode, stage, **self.inputs(0, False))
        return self.specs[stage]

    def operations(self) -> Iterator[Op]:
        """This rank's operations in order; what the next one needs begins to arrive before it is asked for."""
        for op, following in zip(self.order, [*self.order[1:], None]):
            self.messages.post(op)
            if following is not None:
                self.messages.post(following)
            yield op
        self.messages.finish()

    def forward(self, op: Op) -> tuple[list[Tensor], Any, bool]:
        """The activations that came in, what came out, and whether that is the result of the pass."""
        activations = self.messages.take(op)
        if torch.is_grad_enabled():
            activations = [x.requires_grad_() for x in activations]
        inputs = self.inputs(op.micro, op.stage == 0)
        if not self.single:
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
            self.run.backward(seed(out, gradients))
        if activations:
            # ``send`` notices if one is None.
            self.messages.send(op, [x.grad for x in activations if x.grad is not None])


def _orders(run: Runner, mode: str, make: Callable[[int, int, int], list[Op]]) -> list[list[Op]]:
    """The order of every pipeline rank; ``make``: (ranks, rank, chunks of the pass on a rank) -> that rank's."""
    p = run.mesh.pp
    chunks = 1 if p == 1 else run.legs(mode) * run.mesh.virtual_stages
    return [make(p, rank, chunks) for rank in range(p)]


@torch.no_grad()
def forward(run: Runner, mode: str, inputs: Inputs, micro_batches: int) -> list[Any]:
    """Forwards without graph; the results by micro-batch on the last pipeline rank, nothing on the others."""
    trip = _Trip(run, mode, inputs, _orders(run, mode, partial(forward_order, m=micro_batches)))
    results = []
    for op in trip.operations():
        _, out, is_last = trip.forward(op)
        if is_last:
            results.append(out)
    return results


def forward_everywhere(
    run: Runner, mode: str, inputs: Inputs, micro_batches: int, spec: Callable[[], ActivationSpec]
) -> list[Tensor]:
    """``forward`` of a pass whose result is one tensor, which every pipeline rank gets; ``spec``: shape and dtype."""
    results = forward(run, mode, inputs, micro_batches)
    if run.mesh.pp == 1:
        return results
    shape, dtype = spec()
    assert all((tuple(x.shape), x.dtype) == (shape, dtype) for x in results), (results[0].shape, shape, dtype)
    return _on_all_stages(run, results, [(shape, dtype)] * micro_batches)


def _on_all_stages(run: Runner, tensors: list[Tensor], specs: Sequence[ActivationSpec]) -> list[Tensor]:
    """The last pipeline rank's ``tensors`` on every one; ``specs``: their shapes and dtypes."""
    if not run.mesh.is_last_stage:
        tensors = [torch.empty(shape, dtype=dtype, device=run.device) for shape, dtype in specs]
    return [broadcast_last_stage(x.contiguous(), run.mesh) for x in tensors]


def train(run: Runner, mode: str, inputs: Inputs, micro_batches: int, loss: Callable[[Any, int], Tensor]) -> None:
    """Forwards and backwards of all micro-batches; ``loss``: (result, micro-batch) -> scalar, on the last rank."""
    schedule = run.schedule if run.mesh.pp > 1 else "1f1b"
    orders = _orders(run, mode, partial(train_order, schedule, m=micro_batches))
    trip = _Trip(run, mode, inputs, orders)
    for op in trip.operations():
        if op.kind == "F":
            activations, out, is_last = trip.forward(op)
            trip.held[op.stage, op.micro] = activations, loss(out, op.micro) if is_last else out
        else:
            trip.backward(op)


def infer(run: Runner, mode: str, **inputs: Any) -> Any:
    """The result of a forward-only pass, a tensor or several, on every pipeline rank. For evaluation: it waits."""
    results = forward(run, mode, lambda micro, first: dict(inputs), 1)
    if run.mesh.pp == 1:
        return results[0]
    result: Any = results[0] if results else ()
    alone = isinstance(result, Tensor)
    tensors = [result] if alone else list(result)
    specs = [(x.shape, x.dtype) for x in tensors]
    alone, specs = broadcast_last_stage_object((alone, specs), run.mesh)
    tensors = _on_all_stages(run, tensors, specs)
    return tensors[0] if alone else tuple(tensors)
