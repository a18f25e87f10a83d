"""ZeRO-3 gathers what a module needs when it runs, and the next block while one computes, and lets go of it afterwards.

This takes the place of DeepSpeed's coordinator, which does the same by some hundred calls of Python for each parameter
that comes and goes: milliseconds for a block, in which a GPU waits for the host. To gather ahead it would need a
recorded order of module calls, which is switched off (``deepspeed_adapter.initialize`` says why). The order of the
blocks of a chunk is known without a recording: forward the one after a block is next, backward the one before it. So
nothing is gathered in vain, and at most two blocks are whole at one time.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from megavtp.parallel.striping import Stripe


def block_chains(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Give the blocks of each chunk of every tower on this rank, in the order in which they run."""
    for tower in model.modules():
        if isinstance(stripe := getattr(tower, "stripe", None), Stripe):
            for chunk in stripe.chunks[stripe.rank :: stripe.pp]:
                yield [tower.get_submodule(f"blocks.{number}") for number in chunk]


class ModuleGathers:
    """Gathers and releases the parameters of a ZeRO-3 engine's modules, where DeepSpeed's hooks around them ask for it.

    Args:
        chains: blocks that run one after the other; each one's neighbour is gathered ahead.
    """

    def __init__(self, engine: Any, chains: Iterable[Sequence[nn.Module]]) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self.status = ZeroParamStatus
        offload = engine.optimizer.parameter_offload
        coordinator = offload.get_param_coordinator()
        self.under_way: dict[nn.Parameter, Any] = {}
        # By number. At the end of a backward, DeepSpeed releases for those that are still in it.
        self.in_backward: dict[int, Any] = coordinator._PartitionedParameterCoordinator__active_backward_submodules
        pairs = [pair for chain in chains for pair in pairwise(chain)]
        self.after = dict(pairs)
        # Behind a block without gradients, no backward goes on.
        self.before = {second: first for first, second in pairs if any(p.requires_grad for p in first.parameters())}
        self.all_parameters: list[Any] = list(engine.module.parameters())
        self.owned: dict[nn.Module, tuple[Any, ...]] = {}
        self.empty: dict[torch.dtype, Tensor] = {}
        coordinator.fetch_sub_module = self.fetch
        coordinator.release_sub_module = self.release
        offload.partition_all_parameters = self.release_all

    def parameters_of(self, module: Any) -> tuple[Any, ...]:
        """Return what is gathered for a module: all of a block, what others hold themselves, and what they borrow."""
        owned = self.owned.get(module)
        if owned is None:
            from deepspeed.utils import z3_leaf_module

            owned = self.owned[module] = tuple(module.parameters(recurse=z3_leaf_module(module)))
        return owned + tuple(module._external_params.values()) if module._external_params else owned

    def begin(self, parameters: Iterable[Any]) -> None:
        """Begin to gather those of them that are neither gathered nor under way."""
        absent = [p for p in parameters if p.ds_status is self.status.NOT_AVAILABLE]
        if absent:
            # On the stream that computes: on another one, DeepSpeed's way, it could read shards that an update, such as
            # the teacher's, still writes. The transport has a stream of its own in any case.
            gather = absent[0].all_gather_coalesced(absent)
            self.under_way.update(dict.fromkeys(absent, gather))

    @torch.no_grad()
    def fetch(self, module: Any, forward: bool) -> None:
        """Gather what ``module`` needs, and begin to gather its neighbour."""
        parameters = self.parameters_of(module)
        self.begin(parameters)
        if not forward:
            self.in_backward[module.ds_id] = module
        recomputed = forward and torch._C._current_graph_task_id() != -1  # a forward inside a backward
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(module.ds_id)
            if recomputed and self.in_backward and not parameter.requires_grad:
                # Nothing of its own runs backward and would release it. The module does whose backward asked for it.
                asked = next(reversed(self.in_backward.values()))
                asked.ds_recompute_parameters.add(parameter)
                parameter.ds_active_sub_modules.add(asked.ds_id)
            if (gather := self.under_way.pop(parameter, None)) is not None:
                gather.wait()
        # After a recomputation the block before this one is what runs next.
        neighbours = self.after if forward and not recomputed else self.before
        if (neighbour := neighbours.get(module)) is not None:
            self.begin(self.parameters_of(neighbour))

    @torch.no_grad()
    def release(self, module: Any, forward: bool = False) -> None:
        """Let go of what ``module`` needed and no other module still does."""
        parameters = self.parameters_of(module)
        if not forward:
            parameters += tuple(module.ds_recompute_parameters)
            module.ds_recompute_parameters.clear()
            self.in_backward.pop(module.ds_id, None)
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(module.ds_id)
            if not parameter.ds_active_sub_modules and not parameter.is_external_param:
                self.free(parameter)

    @torch.no_grad()
    def release_all(self) -> None:
        """Let go of everything, as an update writes the shards."""
        for gather in self.under_way.values():
            gather.wait()
        self.under_way.clear()
        for parameter in self.all_parameters:
            parameter.ds_active_sub_modules.clear()
            self.free(parameter)

    def free(self, parameter: Any) -> None:
        if parameter.ds_status is self.status.AVAILABLE:
            if parameter.is_cuda:
                parameter.data.record_stream(torch.cuda.current_stream())
            if parameter.dtype not in self.empty:
                self.empty[parameter.dtype] = parameter.new_empty(0)
            parameter.data = self.empty[parameter.dtype]
            parameter.ds_status = self.status.NOT_AVAILABLE
