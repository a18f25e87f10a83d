"""ZeRO-3 gathers the next block while one computes: forward the one after it, backward the one before it.

DeepSpeed would do so from a recorded order of module calls, but that is switched off (``deepspeed_adapter.initialize``
says why). The order of the blocks of a chunk is known without a recording. Every block that is asked for here is the
next that runs, so nothing is gathered in vain, and at most two blocks are whole at one time.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from megavtp.parallel.striping import Stripe


def block_chains(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Give the blocks of each chunk of every tower on this rank, in the order in which they run."""
    for tower in model.modules():
        if isinstance(stripe := getattr(tower, "stripe", None), Stripe):
            for chunk in stripe.chunks[stripe.rank :: stripe.pp]:
                yield [tower.get_submodule(f"blocks.{number}") for number in chunk]


def gather_ahead(engine: Any, chains: Iterable[Sequence[nn.Module]]) -> None:
    """Let a ZeRO-3 engine begin to gather each block's neighbour in ``chains`` once the block itself is there.

    Whoever needs the neighbour waits for it in DeepSpeed's own fetch, which finds it in the registry of what is in
    flight.
    """
    pairs = [pair for chain in chains for pair in pairwise(chain)]
    after = dict(pairs)
    # Behind a block without gradients, no backward goes on.
    before = {second: first for first, second in pairs if any(p.requires_grad for p in first.parameters())}
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    @torch.no_grad()
    def fetch_and_begin(module: nn.Module, forward: bool) -> None:
        fetch(module, forward=forward)
        # A forward inside a backward is a recomputation: the block before this one is what runs next.
        backward = not forward or torch._C._current_graph_task_id() != -1
        if (neighbour := (before if backward else after).get(module)) is not None:
            begin(set(neighbour.parameters()), not backward)

    # It gathers those of them that are neither gathered nor in flight.
    begin = coordinator._PartitionedParameterCoordinator__all_gather_params
    coordinator.fetch_sub_module = fetch_and_begin
