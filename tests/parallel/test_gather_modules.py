"""ZeRO-3 gathers the next block while one computes: the order of events, what is whole at a time, the bytes, and the
host's work for it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from layouts import Cell, Run
from tiny_run import tiny_config
from torch import Tensor

from megavtp.config.load import from_dict
from megavtp.dit.config import DiTConfig, complete_config
from megavtp.dit.model.average import AveragedDiT
from megavtp.dit.validate import validate_dit
from megavtp.models.vtp import VTP
from megavtp.nn.block import Block as TransformerBlock
from megavtp.parallel import deepspeed_adapter as adapter
from megavtp.parallel.gather_modules import block_chains
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.shard_matrix import Gather
from megavtp.parallel.traffic import count_traffic

RECOMPUTE = ("none", "full")  # "selective" recomputes inside a block only
PIPELINE = Cell(pp=2, dp=2, zero=3, micro_batches=2, off="contrastive")


Block = tuple[str, int]  # tower and number

DIT = {"model": {"width": 48, "depth": 5, "heads": 4, "latent_size": 4, "latent_channels": 8, "num_classes": 3}}


class Event(NamedTuple):
    """What happened to a block: its gather is begun or waited for, or it starts or ends to compute."""

    kind: str  # begun, arrived, forward, forward done, backward, backward done
    block: Block
    whole: int  # blocks that are gathered or in flight right after


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[list[Event]]:
    """The events of the blocks, by hooks behind DeepSpeed's and inside the handles of its gathers."""
    blocks = {
        (name.rpartition(".blocks")[0], int(name.rpartition(".")[2])): module
        for name, module in model.named_modules() if isinstance(module, TransformerBlock)
    }
    owner = {id(p): key for key, block in blocks.items() for p in block.parameters()}
    events: list[Event] = []

    def note(kind: str, key: Block) -> None:
        present = (block for block in blocks.values() if next(block.parameters()).ds_status.name != "NOT_AVAILABLE")
        events.append(Event(kind, key, sum(1 for _ in present)))

    def of_handle(kind: str, method: Any) -> Any:
        def noting(handle: Any, *args: Any, **options: Any) -> None:
            waits_again = kind == "arrived" and handle.complete
            method(handle, *args, **options)
            key = owner.get(id(handle.parameters[0]))
            if key is not None and not waits_again:
                note(kind, key)

        return noting

    def watch(key: Block, block: torch.nn.Module) -> list[Any]:
        def before(_: Any, inputs: tuple) -> None:
            if torch._C._current_graph_task_id() == -1:  # no recomputation
                note("forward", key)
                if inputs[0].requires_grad:
                    inputs[0].register_hook(lambda gradient: note("backward done", key))

        def after(_: Any, inputs: tuple, output: Tensor) -> None:
            note("forward done", key)
            if output.requires_grad:
                output.register_hook(lambda gradient: note("backward", key))

        return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    hooks = [hook for key, block in blocks.items() for hook in watch(key, block)]
    with (
        patch.object(Gather, "__init__", of_handle("begun", Gather.__init__)),
        patch.object(Gather, "wait", of_handle("arrived", Gather.wait)),
    ):
        yield events
    for hook in hooks:
        hook.remove()


class Step(NamedTuple):
    """The events of a step, the rank's blocks of the trunk, and bytes and calls by (axis, operation)."""

    events: list[Event]
    trunk: list[int]
    sent: dict
    messages: dict


def _of_a_step(cell: Cell, ahead: bool = True) -> Step:
    with nullcontext() if ahead else patch.object(adapter, "block_chains", lambda model: []):
        run = Run(config=cell.config())
    with recorded(run.model) as events, count_traffic(run.mesh) as traffic:
        run.train(0, 1)
    run.engine.close()
    return Step(events, [int(number) for number in run.model.trunk.blocks], dict(traffic.sent), dict(traffic.messages))


def calls_for_a_parameter() -> float:
    """Calls of functions, also of those in C, for each parameter of a block that is gathered and released."""
    run = Run(config=Cell(dp=2, zero=3).config())
    block = run.model.trunk.blocks["3"]  # the last one, so that no other is gathered ahead
    coordinator = run.engine._engine.optimizer.parameter_offload.get_param_coordinator()
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for _ in range(2):  # the first time it is also looked up which parameters the block has
        calls = 0
        sys.setprofile(count)
        coordinator.fetch_sub_module(block, forward=True)
        whole = [parameter.ds_status.name for parameter in block.parameters()]
        coordinator.release_sub_module(block, forward=True)
        sys.setprofile(None)
    assert set(whole) == {"AVAILABLE"}
    assert {parameter.ds_status.name for parameter in block.parameters()} == {"NOT_AVAILABLE"}
    run.engine.close()
    return calls / len(whole)


def two_ranks(rank: int) -> tuple[dict[str, Step], float]:
    found = {name: _of_a_step(Cell(dp=2, zero=3, recompute=name)) for name in RECOMPUTE}
    return found | {"not ahead": _of_a_step(Cell(dp=2, zero=3), ahead=False)}, calls_for_a_parameter()


def four_ranks(rank: int) -> tuple[Step, Step]:
    return _of_a_step(PIPELINE), _of_a_step(PIPELINE, ahead=False)


@pytest.fixture(scope="module")
def found_and_calls() -> tuple[dict[str, Step], float]:
    return run_ranks(2, two_ranks, timeout=240)[0]


@pytest.fixture
def found(found_and_calls: tuple[dict[str, Step], float]) -> dict[str, Step]:
    return found_and_calls[0]


def check_order(events: list[Event], neighbours: dict[str, dict[Block, Block]]) -> Counter:
    """Each time that a block has computed, its neighbour's gather is under way: it was begun after this block's own
    had arrived, before it ended, and is waited for later. Return how often, by (direction, tower)."""
    counts: Counter = Counter()
    started: dict[tuple[str, Block], int] = {}
    for now, (kind, block, _) in enumerate(events):
        direction = kind.split()[0]
        if not kind.endswith("done"):
            started[kind, block] = now
            continue
        neighbour = neighbours[direction].get(block)
        if neighbour is None:
            continue
        earlier = [event[:2] for event in events[:now]]
        begun = max(i for i, event in enumerate(earlier) if event == ("begun", neighbour))
        own = max(i for i, event in enumerate(earlier) if event == ("arrived", block))
        assert own < begun < now, (kind, block)
        assert ("arrived", neighbour) not in earlier[begun:], (kind, block)
        assert direction == "backward" or begun < started["forward", block]
        later = (event.kind for event in events[now + 1 :] if event.block == neighbour)
        assert next(kind for kind in later if kind != "backward") == "arrived", (kind, block)
        counts[direction, block[0]] += 1
    return counts


def neighbours_of(chunks: dict[str, Sequence[int]]) -> dict[str, dict[Block, Block]]:
    """By direction: block -> the one that runs next, given the blocks of each tower's one chunk."""
    pairs = [((tower, a), (tower, b)) for tower, numbers in chunks.items() for a, b in pairwise(numbers)]
    return {"forward": dict(pairs), "backward": {second: first for first, second in pairs}}


TOWERS = {"trunk": 4, "teacher.trunk": 4, "text": 2, "pixel_decoder": 3}
PASSES = {  # how often a tower runs in a step, forward and backward
    ("forward", "trunk"): 3, ("backward", "trunk"): 3, ("forward", "teacher.trunk"): 1, ("forward", "text"): 1,
    ("backward", "text"): 1, ("forward", "pixel_decoder"): 1, ("backward", "pixel_decoder"): 1,
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_next_block_is_gathered_while_one_computes(recompute: str, found: dict) -> None:
    neighbours = neighbours_of({tower: range(depth) for tower, depth in TOWERS.items()})
    expected = {(kind, tower): times * (TOWERS[tower] - 1) for (kind, tower), times in PASSES.items()}
    assert check_order(found[recompute].events, neighbours) == expected


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_at_most_two_blocks_are_whole(recompute: str, found: dict) -> None:
    assert max(event.whole for event in found[recompute].events) == 2
    assert max(event.whole for event in found["not ahead"].events) == 1


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_nothing_more_is_sent(recompute: str, found: dict) -> None:
    assert found[recompute][2:] == found["not ahead"][2:]


def test_the_host_does_little_for_a_parameter(found_and_calls: tuple[dict[str, Step], float]) -> None:
    """DeepSpeed's own coordinator makes 275 calls, and a GPU would wait for them at every block."""
    assert found_and_calls[1] < 50


def names_of_chains(model: torch.nn.Module) -> list[list[str]]:
    names = {module: name for name, module in model.named_modules()}
    return [[names[block] for block in chain] for chain in block_chains(model)]


def test_chains_are_the_chunks_of_each_tower() -> None:
    """Also where a rank has two chunks of a tower, and in a DiT, whose average is a tower as well."""
    settings = {"vision": {"depth": 8}, "text": {"depth": 3}, "decoder": {"depth": 4}}
    mesh = Mesh(pp=2, pp_rank=1, virtual_stages=2)
    with torch.device("meta"):
        model = VTP(tiny_config({"model": settings}).model, mesh, objectives=frozenset({"reconstruction"}))
        dit = AveragedDiT(complete_config(validate_dit(from_dict(DIT, DiTConfig), 1)).model)
    chunks = {tower: getattr(model, tower).stripe.chunks[1::2] for tower in ("trunk", "pixel_decoder")}
    assert names_of_chains(model) == [
        [f"{tower}.blocks.{number}" for number in chunk] for tower, parts in chunks.items() for chunk in parts
    ]
    assert names_of_chains(dit) == [[f"{tower}.blocks.{number}" for number in range(5)] for tower in ("dit", "ema")]


def test_chunks_of_a_pipeline() -> None:
    """Each rank has one chunk of a tower, whose blocks are neighbours in whichever order micro-batches come."""
    for ahead, plain in run_ranks(4, four_ranks, timeout=240):
        counts = check_order(ahead.events, neighbours_of({"trunk": ahead.trunk, "teacher.trunk": ahead.trunk}))
        pairs = len(ahead.trunk) - 1
        times = {("forward", "trunk"): 6, ("backward", "trunk"): 4, ("forward", "teacher.trunk"): 2}
        assert counts == {key: count * pairs for key, count in times.items() if pairs}
        assert max(event.whole for event in ahead.events) == 2
        assert ahead[2:] == plain[2:]
