"""What compiled regions hold and make, without compiling them.

A compiled region is one pass over memory. It makes nothing but its results; for the backward it holds those of its
inputs from which all that its plain form holds can be computed again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from megavtp.nn.compiling import Compile, compile_regions, wanted

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


def count_regions(setting: Compile, on_gpu: bool, *networks: object) -> None:
    """Give the networks' regions this form if ``parallel.compile`` would compile them."""
    if wanted(setting, on_gpu):
        for network in networks:
            compile_regions(network, counted)


@cache
def _look(function: Callable[..., Any], places: Sequence[int], facts: Sequence[Facts], others: Sequence[Any]) -> _Held:
    """Run the plain form on tensors without storage, unseen by those that count."""
    arguments, origins, held = list(others), _Origins(), set[int]()

    def note(x: Tensor) -> Tensor:
        held.update(origins.of(x))
        return x

    with _disable_current_modes():
        for number, (place, (size, dtype, wants_gradient)) in enumerate(zip(places, facts)):
            arguments[place] = torch.empty(size, dtype=dtype, device="meta", requires_grad=wants_gradient)
            origins.add(arguments[place], {number})
        with origins, saved_tensors_hooks(note, lambda x: x):
            results, shape = tree_flatten(function(*arguments))
    return _Held(sorted(held), [(x.shape, x.dtype) for x in results], shape)


class _Origins(TorchDispatchMode):
    """Tells from which inputs a tensor is computed, by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[int, set[int]] = {}
        self._alive: list[Tensor] = []  # a storage that is freed would give its address to another

    def add(self, x: Tensor, inputs: set[int]) -> None:
        self._alive.append(x)
        self._inputs[x.untyped_storage()._cdata] = self.of(x) | inputs

    def of(self, x: Tensor) -> set[int]:
        return self._inputs.get(x.untyped_storage()._cdata, set())

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        results = operation(*arguments, **(keywords or {}))
        read = [self.of(x) for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor)]
        for made in tree_leaves(results):
            if isinstance(made, Tensor):
                self.add(made, set().union(*read))
        return results


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
