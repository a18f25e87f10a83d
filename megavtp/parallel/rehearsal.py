"""A rehearsal: the real modules on tensors without data, in groups without processes.

It counts what a piece of the model would hold, need at most and send, for any size and any number of ranks, in
milliseconds and without memory. So the planner has no second description of the model that could go stale. One rank of
a large world can also play whole steps, DeepSpeed's part included (``rehearsed_rank``), to check what the planner says.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavtp.parallel import gradient_norm
from megavtp.parallel.deepspeed_adapter import import_deepspeed, zero3_linear
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.traffic import Traffic, count_traffic

_LINEAR = torch._C._nn.linear  # what torch.nn.functional calls linear until a ZeRO-3 engine replaces it


@dataclass(frozen=True)
class Rehearsed:
    """What a piece of the model held, needed and sent, in bytes."""

    held: int  # alive at the end of its forward: what the backward needs, and the result
    peak: int  # most alive at one time, forward and backward
    forward: Traffic  # what this rank took part in sending, here and in the backward
    backward: Traffic


@contextmanager
def rehearsal(
    *, tp: int = 1, dp: int = 1, fused_norms: bool = False, zero3: bool = False, **fields: Any
) -> Iterator[Mesh]:
    """Give a mesh of fake groups; inside, all new tensors have a shape, dtype and storage size, but no data.

    The kernels are the CPU's. ``fused_norms``: RMS norms keep for the backward what CUDA's fused kernel keeps, their
    input and a number a row; the CPU's keep the normalised rows too. ``zero3``: linear layers keep what they do under
    ZeRO 3, their weights and not the 16-bit copies of them. ``fields``: further fields of the mesh.
    """
    with _world(0, tp * dp, fused_norms, zero3_linear() if zero3 else _LINEAR):
        tp_group = dist.new_group(list(range(tp))) if tp > 1 else None
        dp_group = dist.new_group(list(range(0, tp * dp, tp))) if dp > 1 else None
        yield Mesh(tp=tp, dp=dp, tp_group=tp_group, dp_group=dp_group, **fields)


@contextmanager
def _world(rank: int, size: int, fused_norms: bool, linear: Callable[..., Tensor]) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a rehearsal has a world of its own"
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    norms = patch.object(F, "rms_norm", _fused_norm) if fused_norms else nullcontext()
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(), norms,
            patch.object(F, "linear", linear),
        ):
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def rehearsed_rank(
    rank: int, world_size: int, towers: AbstractSet[str], *, fused_norms: bool = False
) -> Iterator["LiveBytes"]:
    """Be one rank of a world whose other ranks are not there; inside, a run can be set up and can train.

    What other ranks send has a size and no data. Of what they would say in words, only the ``towers`` that any of them
    trains are known. Whatever the host asks of a tensor is answered with no: nothing is NaN or infinite. Give what is
    alive of the tensors that are made inside.
    """
    deepspeed = import_deepspeed()
    live = LiveBytes()
    place = {"RANK": f"{rank}", "LOCAL_RANK": "0", "WORLD_SIZE": f"{world_size}"}
    try:
        with (
            _world(rank, world_size, fused_norms, _LINEAR), patch.dict(os.environ, place),
            patch.object(nn.Module, "_apply", _converted), live, _Denials(),
            patch.object(gradient_norm, "all_gather_object", lambda own: [towers]),
        ):
            yield live
    finally:
        deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None  # DeepSpeed would keep this world's


def rehearse(
    mesh: Mesh, forward: Callable[[], Any], parameters: Sequence[Tensor] = (), *, inputs: Sequence[Tensor] = ()
) -> Rehearsed:
    """Count ``forward()`` and the backward pass from every tensor with a gradient that it returns.

    ``parameters`` get their gradients before the count: these belong to the state of a run. ``inputs`` get theirs in
    it, so that it can be run again.
    """
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    for x in inputs:
        x.grad = None
    live = LiveBytes()
    with live:
        with count_traffic(mesh) as sent:
            results = [x for x in tree_leaves(forward()) if isinstance(x, Tensor)]
        held = live.now
        with count_traffic(mesh) as sent_back:
            results = [x for x in results if x.requires_grad]
            if results:
                torch.autograd.backward(results, [torch.empty_like(x) for x in results])
    return Rehearsed(held, live.peak, sent, sent_back)


class _FusedNorm(torch.autograd.Function):
    """A norm that keeps what CUDA's fused RMS norm keeps: its input, the weight, and a number for each row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _fused_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedNorm.apply(input, weight)


class _Denials(TorchDispatchMode):
    """Answers the host's questions about tensors without data with no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False
        return func(*args, **(kwargs or {}))


def _converted(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert a module's tensors as ``Module._apply`` does, which fails where something else refers to a fake one."""
    for part in module.modules() if recurse else [module]:
        with torch.no_grad():
            for name, parameter in part._parameters.items():
                if parameter is not None and (new := convert(parameter)) is not parameter:
                    part._parameters[name] = nn.Parameter(new, parameter.requires_grad)
            part._buffers.update({name: convert(x) for name, x in part._buffers.items() if x is not None})
    return module


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that were made inside and are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor) and x.device.type != "meta"]
        for storage in made:
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in before:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._drop, key, size)
        return result

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
