"""Compiled regions: elementwise work between matrix products, which ``torch.compile`` makes one pass over memory of.

A *region* is a function of tensors: a norm with its cast, the rotation of queries and keys, a gate, a residual sum with
layer scale and stochastic depth, the norms of the DINO head, the distance of two features of the perceptual network.
Products, attention, collectives and the hooks that gather weights are not in it, so it is the same on every layout: its
weights are arguments, gathered and whole, and what a collective has to do with them is done before. A class marks its
regions with ``Region``, and ``compile_regions`` gives a model their compiled form; without it they are plain functions.

The first dimension of an argument with more than one is dynamic: tokens or samples, whose number changes from step to
step. All else is fixed. A region is one graph, or an error.
"""

import importlib.util
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megavtp.errors import UserError
from megavtp.parallel.collectives import all_gather_object, is_first

log = logging.getLogger(__name__)

Compile = Literal["none", "blocks", "auto"]
REMEDY = "set parallel.compile=none"
BACKEND = "inductor"
# What makes 16 bits of 32 and 32 of them again rounds as it does uncompiled: the released models' rotary tables ask for
# that, and a run that is continued without compilation finds the same numbers.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}
_GRAPHS = 64  # of one region: for each width, number type, with gradients and without; more is a fault, and an error


class Region(staticmethod):
    """Marks a function that a class calls as a region."""


@dataclass
class Compilation:
    """What this process has compiled so far: seconds, and graphs with their backward passes."""

    seconds: float = 0.0
    graphs: int = 0
    _begun: float = 0.0


COMPILED = Compilation()
_thread = threading.local()


def compile_regions(network: object, form: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None) -> int:
    """Replace the regions of all modules of a network by another form; the compiled one compiles when it is called.

    Return the number of regions. A network that is no module has none.
    """
    form, count = form or compiled, 0
    for module in network.modules() if isinstance(network, nn.Module) else ():
        for name, value in vars(type(module)).items():
            if isinstance(value, Region):
                setattr(module, name, form(value.__func__))
                count += 1
    return count


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function``, once for all modules that have it as a region."""
    _prepare()
    options = OPTIONS if BACKEND == "inductor" else None
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, options=options)

    def call(*arguments: Any) -> Any:
        rows = [argument for argument in arguments if isinstance(argument, Tensor) and argument.ndim > 1]
        if not all(map(len, rows)):
            return function(*arguments)  # a rank that keeps no sequence has nothing to compute
        _allow_graphs()
        for argument in rows:
            if len(argument) > 1:  # one row has a graph of its own, as torch takes a size of 1 for a constant
                torch._dynamo.mark_dynamic(argument, 0)
        try:
            return run(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"torch.compile failed on {function.__name__} ({reason}): {REMEDY}") from error

    return call


def _allow_graphs() -> None:
    """Raise torch's limit of graphs, which is a thread's own: recomputation runs in the backward's."""
    if not getattr(_thread, "allows", False):
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        _thread.allows = True


@cache
def _prepare() -> None:
    torch._dynamo.callback.on_compile_start(_begin)
    torch._dynamo.callback.on_compile_end(_end)


def _begin(_: Any) -> None:
    COMPILED._begun = time.perf_counter()


def _end(_: Any) -> None:
    COMPILED.seconds += time.perf_counter() - COMPILED._begun
    COMPILED.graphs += 1


def why_not(device: torch.device) -> str | None:
    """Say what this machine lacks to compile for ``device``; None if nothing is known to be missing."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler: install g++, or name one in CXX"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "triton needs a GPU of compute capability 7.0 or more"
    return None


def wanted(setting: Compile, on_gpu: bool) -> bool:
    return setting == "blocks" or (setting == "auto" and on_gpu)


def compile_networks(setting: Compile, device: torch.device, *networks: object) -> None:
    """Compile the regions of the networks if ``compiles`` says so; every rank calls this."""
    if compiles(setting, device):
        for network in networks:
            if compile_regions(network) == 0 and isinstance(network, nn.Module) and is_first():
                log.warning("parallel.compile leaves %s as it is: it has no regions", type(network).__name__)


def compiles(setting: Compile, device: torch.device) -> bool:
    """Tell whether a run on ``device`` compiles: "auto" does on a GPU whose machine can. All ranks do, or none.

    Every rank calls this. UserError: "blocks" is asked for, and a rank cannot.
    """
    if not wanted(setting, device.type == "cuda"):
        return False
    missing = next((reason for reason in all_gather_object(why_not(device)) if reason is not None), None)
    if missing is not None and setting == "blocks":
        raise UserError(f"parallel.compile=blocks, but {missing}; or {REMEDY}")
    if missing is not None and is_first():
        log.warning("parallel.compile=auto compiles nothing, as %s", missing)
    return missing is None
