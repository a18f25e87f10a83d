"""What a pipeline really does: the order of its work, the bytes it sends, what it holds, what every rank is told."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from layouts import Cell, Run
from test_orders import torch_order
from tiny_run import build_model, data_of
from torch import Tensor

from megavtp.parallel import pipeline
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.orders import Op, forward_order, simulate
from megavtp.parallel.traffic import count_traffic

PLACES = [(2, "gpipe", 4), (2, "1f1b", 4), (2, "interleaved_1f1b", 4), (4, "1f1b", 4), (4, "gpipe", 2)]  # pp, order, m
LEGS = {"contrastive": 1, "student": 1, "reconstruction": 2, "teacher": 1}
FLOAT, PATCHES, WIDTH, CONTEXT, CHANNELS = 4, 4, 32, 8, 8  # of the tiny model: 32 x 32 pixels in patches of 16
LOCAL_PATCHES, CROPS, LOCAL_CROPS, IMAGES = 1, 2, 2, 16


@dataclass
class Seen:
    """Of one step on one rank. Trips are (mode, whether with gradient)."""

    orders: dict[tuple[str, bool], list[Op]] = field(default_factory=dict)
    calls: list[tuple] = field(default_factory=list)  # the engine's forwards and backwards, in order
    bytes: int = 0  # sent to other pipeline ranks
    held: int = 0  # most graphs at a time


def _watched(seen: Seen) -> list:
    forward, backward, call, back = (
        pipeline._Trip.forward, pipeline._Trip.backward, Engine.__call__, Engine.backward
    )

    def trip_forward(self: Any, op: Op) -> Any:
        seen.orders.setdefault((self.mode, torch.is_grad_enabled()), []).append(op)
        result = forward(self, op)
        seen.held = max(seen.held, len(self.held) + torch.is_grad_enabled())
        return result

    def trip_backward(self: Any, op: Op) -> None:
        seen.orders[self.mode, True].append(op)
        backward(self, op)

    def engine_call(self: Engine, mode: str, **inputs: Any) -> Any:
        seen.calls.append(("F", mode, inputs["stage"]))
        return call(self, mode, **inputs)

    def engine_backward(self: Engine, loss: Tensor) -> None:
        seen.calls.append(("B",))
        back(self, loss)

    return [
        patch.object(pipeline._Trip, "forward", trip_forward), patch.object(pipeline._Trip, "backward", trip_backward),
        patch.object(Engine, "__call__", engine_call), patch.object(Engine, "backward", engine_backward),
    ]


def watch(rank: int, places: list[tuple[int, str, int]]) -> list[Seen]:
    found = []
    for pp, schedule, micro_batches in places:
        cell = Cell(pp=pp, dp=4 // pp, schedule=schedule, micro_batches=micro_batches)
        run, seen = Run(config=cell.config({"train": {"steps": 1}})), Seen()
        watchers = _watched(seen)
        for watcher in watchers:
            watcher.start()
        with count_traffic(run.mesh) as traffic:
            run.train()
        for watcher in watchers:
            watcher.stop()
        seen.bytes = traffic.select("pp", "send").bytes
        run.engine.close()
        found.append(seen)
    return found


@pytest.fixture(scope="module")
def watched() -> list[list[Seen]]:
    """By place, then by rank."""
    return [list(ranks) for ranks in zip(*run_ranks(4, watch, PLACES, timeout=200))]


def stages_of(pp: int, schedule: str) -> int:
    """Chunks of a tower."""
    return pp * (2 if schedule == "interleaved_1f1b" else 1)


@pytest.mark.parametrize("place", range(len(PLACES)), ids=lambda n: "pp{} {} m{}".format(*PLACES[n]))
def test_work_is_done_in_the_order_of_theory(place: int, watched: list) -> None:
    """Torch's tables, rank by rank; and so the bubble is (p - 1) / (V m), or the whole pipeline where m < p."""
    pp, schedule, m = PLACES[place]
    virtual = stages_of(pp, schedule) // pp
    for mode, legs in LEGS.items():
        executed = [watched[place][rank].orders for rank in range(pp)]  # of the first data-parallel replica
        V = legs * virtual
        if mode == "teacher":
            assert [orders[mode, False] for orders in executed] == [forward_order(pp, r, V, m) for r in range(pp)]
            assert all((mode, True) not in orders for orders in executed)
            continue
        table = "gpipe" if schedule == "gpipe" else "1f1b"
        if m >= pp:
            for rank, orders in enumerate(executed):
                expected = torch_order(table, pp, rank, V, m)
                if table == "gpipe" and V > 1:  # torch goes back through the micro-batches the other way
                    expected[V * m :] = [Op(k, s, m - 1 - micro) for k, s, micro in expected[V * m :]]
                if table == "1f1b" and V == 1 and rank == pp - 1:  # torch's table counts these forwards from 1
                    expected = [Op(k, s, micro - (k == "F")) for k, s, micro in expected]
                assert orders[mode, True] == expected, (mode, rank)
        done = max(simulate([orders[mode, True] for orders in executed], pp * V))
        if m % pp == 0 or V == 1:
            assert done / (3 * V * m) - 1 == pytest.approx((pp - 1) / (V * m))


@pytest.mark.parametrize("place", range(len(PLACES)), ids=lambda n: "pp{} {} m{}".format(*PLACES[n]))
def test_the_engine_is_called_in_that_order(place: int, watched: list) -> None:
    """What really ran: all forwards of the trips, and a backward for each but those of empty chunks."""
    for seen in watched[place]:
        forwards = [(mode, op.stage) for (mode, _), order in seen.orders.items() for op in order if op.kind == "F"]
        assert sorted((mode, stage) for kind, *rest in seen.calls if kind == "F" for mode, stage in [rest]) == sorted(
            forwards
        )
        backwards = sum(op.kind == "B" for order in seen.orders.values() for op in order)
        assert backwards - 4 * 4 <= sum(call == ("B",) for call in seen.calls) <= backwards


def expected_bytes(pp: int, schedule: str, m: int, rank: int) -> int:
    """What pipeline rank ``rank`` sends in a step, from the shapes alone."""
    chunks = stages_of(pp, schedule)
    images = IMAGES // (4 // pp) // m  # of a micro-batch
    tokens = images * (1 + PATCHES)
    flows = {
        "contrastive": [tokens * WIDTH + images * CONTEXT * WIDTH] * (chunks - 1),
        "teacher": [CROPS * tokens * WIDTH] * (chunks - 1),
        "student": [(CROPS * tokens + LOCAL_CROPS * images * (1 + LOCAL_PATCHES)) * WIDTH] * (chunks - 1),
        "reconstruction": [tokens * WIDTH] * (chunks - 1) + [images * PATCHES * CHANNELS]
        + [images * PATCHES * WIDTH] * (chunks - 1),
    }
    # How often the forward and the backward of each run: the first forward of the terms over the whole batch as well.
    times = {"contrastive": (2, 1), "teacher": (1, 0), "student": (2, 1), "reconstruction": (1, 1)}
    total = 0
    for mode, sizes in flows.items():
        forward, backward = times[mode]
        total += sum(forward * size for stage, size in enumerate(sizes) if stage % pp == rank)
        total += sum(backward * size for stage, size in enumerate(sizes) if (stage + 1) % pp == rank)
    return FLOAT * m * total


@pytest.mark.parametrize("place", range(len(PLACES)), ids=lambda n: "pp{} {} m{}".format(*PLACES[n]))
def test_bytes_sent_equal_the_formula(place: int, watched: list) -> None:
    pp, schedule, m = PLACES[place]
    for rank, seen in enumerate(watched[place]):
        assert seen.bytes == expected_bytes(pp, schedule, m, rank % pp)


def test_1f1b_holds_fewer_graphs_than_gpipe(watched: list) -> None:
    gpipe, one = (watched[PLACES.index((2, schedule, 4))][1].held for schedule in ("gpipe", "1f1b"))
    assert gpipe == 2 * 4 and one < gpipe  # two legs of the reconstruction, four micro-batches


# ---------------------------------------------------------------------------------------------------------------------


def tell(rank: int) -> dict[str, Any]:
    """Results of a forward through the whole pipeline, and the terms of a step, as this rank sees them."""
    cell = Cell(pp=2, zero=3, schedule="interleaved_1f1b")
    run = Run(config=cell.config({"train": {"steps": 1}}))
    batch = run.data(0)
    images = run.passes[0].pixels(batch.images[:5])
    found = {
        "reconstruction": run.engine.infer("reconstruction", images=images),
        "encode_text": run.engine.infer("encode_text", tokens=batch.tokens[:3]),
        "features": run.engine.infer("features", images=images),
    }
    found["decode"] = run.engine.infer("decode", latents=run.engine.infer("encode", images=images))
    found["terms"] = run.train().terms[0]
    run.engine.close()
    return found


def test_every_rank_gets_results_and_terms() -> None:
    ranks = run_ranks(2, tell)
    config = Cell(pp=2, schedule="interleaved_1f1b").plain_config()
    model, batch = build_model(config, SINGLE), data_of(config, SINGLE)(0)
    from megavtp.pixels import normalise

    images = normalise(batch.images[:5])
    with torch.no_grad():
        expected = {
            "reconstruction": model("reconstruction", images=images), "features": model("features", images=images),
            "encode_text": model("encode_text", tokens=batch.tokens[:3]),
            "decode": model("reconstruction", images=images),
        }
    for found in ranks:
        assert found["terms"] == ranks[0]["terms"]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------


def hold(rank: int, gather: str) -> tuple[list[dict], int, list[str]]:
    """Norms of two steps under ZeRO-3, all-gathers of the second, and what is still gathered after it."""
    cell = Cell(pp=2, dp=2, zero=3, micro_batches=2)
    run = Run(config=cell.config({"parallel": {"zero3_gather": gather}}))
    run.train(0, 1)
    with count_traffic(run.mesh) as traffic:
        run.train(1, 2)
    gathered = [name for name, p in run.model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
    run.engine.close()
    return run.norms, len(traffic.select("dp", "all_gather")), gathered


def test_weights_held_for_a_step_are_gathered_once() -> None:
    block, step = (run_ranks(4, hold, gather)[0] for gather in ("block", "step"))
    assert step[0] == block[0]  # the same sums
    assert step[2] == block[2] == []
    assert step[1] < block[1] / 5, (step[1], block[1])


def one_by_one(rank: int, schedule: str, micro_batches: int) -> list[tuple[list[dict], list[dict], list[Op]]]:
    """Terms, norms and the student's operations of a run as usual, and of one whose host may wait in every pass."""
    found = []
    for waits in (False, True):
        cell, seen = Cell(pp=2, schedule=schedule, micro_batches=micro_batches), Seen()
        run = Run(config=cell.config({"train": {"steps": 1}}))
        with patch.object(Engine, "may_wait", lambda *_, waits=waits: waits), ExitStack() as watchers:
            for watcher in _watched(seen):
                watchers.enter_context(watcher)
            run.train()
        run.engine.close()
        found.append((run.terms, run.norms, seen.orders["student", True]))
    return found


@pytest.mark.parametrize("schedule, m", [("interleaved_1f1b", 4), ("gpipe", 2)])
def test_a_pass_one_micro_batch_after_the_other_is_the_same(schedule: str, m: int) -> None:
    for (terms, norms, usual), (other_terms, other_norms, alone) in run_ranks(2, one_by_one, schedule, m, timeout=120):
        for one, other in zip(terms + norms, other_terms + other_norms, strict=True):
            assert other == pytest.approx(one, rel=1e-5)
        assert sorted(alone) == sorted(usual) and alone != usual
        assert [op.micro for op in alone] == sorted(op.micro for op in alone)


def test_a_pass_is_new_to_a_gpu_once() -> None:
    engine = Engine.__new__(Engine)
    engine._known = set()
    for device, new in (("cpu", False), ("cuda", True)):
        engine._known.clear()
        engine.device = torch.device(device)
        for kind in (("student", True), ("student", False), ("teacher", False)):
            assert engine.may_wait(*kind) == new == engine.may_wait(*kind)
            engine.has_run(*kind)
            assert not engine.may_wait(*kind)
