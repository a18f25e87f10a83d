"""What compiled regions hold and make, without compiling them.

A compiled region is one pass over memory. It makes nothing but its results; for the backward it holds those of its
inputs that its plain form holds, and computes the rest from them again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

Facts = tuple[tuple[int, ...], torch.dtype, bool]  # shape, dtype, whether a gradient is wanted


@dataclass(frozen=True)
class _Held:
    """``inputs``: places of the inputs that are held; ``results``: shapes and dtypes; ``shape`` as pytree has it."""

    inputs: list[int]
    results: list[tuple[torch.Size, torch.dtype]]
    shape: Any


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a form of a region for ``compile_regions`` that holds and makes what the compiled one does, in a rehearsal
    (``parallel.rehearsal``)."""

    def call(*arguments: Any) -> Any:
        places = tuple(place for place, x in enumerate(arguments) if isinstance(x, Tensor))
        tensors = [arguments[place] for place in places]
        facts = tuple((tuple(x.shape), x.dtype, x.requires_grad and torch.is_grad_enabled()) for x in tensors)
        others = tuple(None if isinstance(x, Tensor) else x for x in arguments)
        held = _look(function, places, facts, others)
        return tree_unflatten(list(_Counted.apply(held, *tensors)), held.shape)

    return call


@cache
def _look(function: Callable[..., Any], places: Sequence[int], facts: Sequence[Facts], others: Sequence[Any]) -> _Held:
    """Run the plain form on tensors without storage, unseen by those that count."""
    arguments, saved = list(others), set[int]()

    def note(x: Tensor) -> Tensor:
        saved.add(x.untyped_storage()._cdata)
        return x

    with _disable_current_modes(), saved_tensors_hooks(note, lambda x: x):
        for place, (size, dtype, wants_gradient) in zip(places, facts):
            arguments[place] = torch.empty(size, dtype=dtype, device="meta", requires_grad=wants_gradient)
        results, shape = tree_flatten(function(*arguments))
        inputs = [number for number, place in enumerate(places) if arguments[place].untyped_storage()._cdata in saved]
    return _Held(inputs, [(x.shape, x.dtype) for x in results], shape)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: _Held, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*(tensors[number] for number in held.inputs))
        ctx.facts = [(x.shape, x.dtype, x.device) for x in tensors]
        return tuple(torch.empty(shape, dtype=dtype, device=tensors[0].device) for shape, dtype in held.results)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        return None, *(
            torch.empty(shape, dtype=dtype, device=device) if wants else None
            for (shape, dtype, device), wants in zip(ctx.facts, wanted)
        )
