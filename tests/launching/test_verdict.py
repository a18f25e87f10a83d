"""Which rank is to blame, from what all say of themselves."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from megavtp.checkpoint import store
from megavtp.errors import UserError
from megavtp.launch import phase, watchdog
from megavtp.launch.verdict import Report, Verdict, judge, position
from megavtp.parallel.collectives import together

WAITS = dict(at="engine.py:7 in step", in_collective=True)


def report(number: int = 10, age: float = 1.0, **fields) -> Report:
    given = dict(
        host="node", phase=f"step {number}, update", slow=False, broken=False, at="trainer.py:9 in _step",
        in_collective=False,
    )
    return Report(number=number, age=age, **(given | fields))


CASES = {
    "all well": ([report(), report(9, 599.0)], {}, None),
    "one is behind, the others wait for it": (
        [report(10, 601.0, **WAITS), report(9, 603.0), report(11, 590.0, **WAITS)], {},
        "rank 1 (node) hangs: no progress for 603 s (limit: parallel.timeout = 600 s), in step 9, update at "
        "trainer.py:9 in _step",
    ),
    "one is behind, but not for long yet": ([report(10, 601.0, **WAITS), report(9, 599.0)], {}, None),
    "one is behind, and reads": ([report(10, 700.0, **WAITS), report(9, 1000.0, slow=True)], {}, None),
    "in the same phase, one does not wait": (
        [report(10, 601.0, **WAITS), report(10, 601.0)], {}, "rank 1 (node) hangs",
    ),
    "all wait for each other": (
        [report(10, 601.0, **WAITS), report(10, 602.0, **WAITS | {"at": "engine.py:9 in step"})], {},
        "ranks 0 (node), 1 (node) hang: no progress for 602 s (limit: parallel.timeout = 600 s), rank 0 in step 10, "
        "update at engine.py:7 in step; rank 1 in step 10, update at engine.py:9 in step",
    ),
    "reading and writing take three times as long": ([report(10, 1799.0, slow=True)], {}, None),
    "until they do not": ([report(10, 1801.0, slow=True)], {}, "rank 0 (node) hangs"),
    "silent, but not for long": ([report(), report()], {1: 59.0}, None),
    "silent for long": (
        [report(), report(8)], {1: 61.0}, "rank 1 (node): no sign of life: killed (out of memory?), crashed, stuck in "
        "C code, or the machine is lost; last seen in step 8, update at trainer.py:9 in _step",
    ),
    "silent while it reads": ([report(), report(slow=True)], {1: 61.0}, None),
    "a connection broke, and one is silent": ([report(broken=True), report()], {1: 6.0}, "rank 1 (node): no sign of"),
    "a connection broke, it is not yet known to whom": ([report(broken=True, age=601.0), report()], {1: 4.0}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_verdict(name):
    reports, silent, text = CASES[name]
    found = judge(dict(enumerate(reports)), {rank: silent.get(rank, 0.0) for rank in range(len(reports))}, 600)
    assert (found is None) if text is None else found.text.startswith(text), found
    assert found is None or Verdict.load(found.dump()) == found
    assert Report.load(reports[0].dump()) == reports[0]


def test_a_process_that_was_suspended_does_not_hang(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(phase, "_current", phase.Phase(7, "step 1, update", 995.0, False))
    store = dist.HashStore()
    watch = watchdog.Watchdog(store, 0, 1, "node", 10)
    for clock[0] in (1001.0, 1901.0, 1902.0):  # Ctrl-Z, and fg a quarter of an hour later
        watch._beat()
    assert Report.load(store.get("watch/0")).age == 7.0 and watch._verdict is None
    for clock[0] in (1903.0, 1904.0, 1905.0, 1906.0):
        watch._beat()
    assert watch._verdict.text.startswith("rank 0 (node) hangs: no progress for 11 s")


def test_no_limit_for_hangs():
    assert judge({0: report(age=1e9)}, {0: 0.5}, 0) is None
    assert judge({0: report()}, {0: 61.0}, 0) is not None


def test_phases_are_counted():
    before = phase.current().number
    phase.enter("step 3, pass contrastive")
    now = phase.current()
    assert (now.number, now.name, now.slow) == (before + 1, "step 3, pass contrastive", False)


def seen_meanwhile(wait, until, then=lambda: None) -> tuple[str, bool]:
    """What the watchdog's thread sees of the main one, once it is ``until``, while that is in ``wait``."""
    found = [("", False)]

    def look():
        deadline = time.monotonic() + 20
        while not until(*found[-1]) and time.monotonic() < deadline:
            found.append(position())
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=look)
    thread.start()
    wait(thread.join)
    thread.join()
    return found[-1]


def test_where_the_main_thread_is():
    at, waits = seen_meanwhile(together, lambda at, waits: "together" in at)
    assert at.startswith("collectives.py:") and at.endswith(" in together") and waits
    assert position() == ("", False)


def test_the_rank_that_writes_is_to_blame_and_not_the_one_that_waits_for_its_part(tmp_path, monkeypatch):
    """The main threads of both wait for their own writer."""
    stuck = [True]

    def write(path, tensors):
        while tensors and stuck:
            time.sleep(0.01)
        raise OSError(5, "made up")

    def finish(wait):
        with pytest.raises(UserError):
            wait()

    monkeypatch.setattr(store, "write_tensors", write)
    stores = [store.CheckpointStore(tmp_path, 1, "token") for _ in range(2)]
    stores[1].save(1, {"x": torch.ones(1)}, writer=1, writers=2)
    at, waits = seen_meanwhile(lambda _: finish(stores[1].wait), lambda at, waits: "store.py" in at, stuck.clear)
    assert at.endswith(" in _write_part") and not waits
    for note in tmp_path.glob("*/*.failed"):
        note.unlink()

    def leave_note():
        next(tmp_path.glob("*.partial-*")).joinpath("part-00001.failed").write_text("made up")

    stores[0].save(1, {}, {}, writer=0, writers=2)
    at, waits = seen_meanwhile(lambda _: finish(stores[0].wait), lambda at, waits: "_wait_for" in at, leave_note)
    assert at.startswith("store.py:") and at.endswith(" in _wait_for_parts") and waits
