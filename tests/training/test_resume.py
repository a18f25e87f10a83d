"""Runs that are killed and started again, on the same layout and on others, and checkpoints that are damaged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from launched import Ranks, events, run, steps_done, succeed, wait_for
from layouts import differences
from observe import note_batches, seen, state
from tiny_run import Outcome

pytestmark = pytest.mark.timeout(900)  # seconds of work, on an idle machine
STEPS, WORLD = 12, 2


class Run:
    """One run's folder; each start has the same command but for ``more``."""

    def __init__(self, recipe: str, folder: Path):
        self.output = folder / "run"
        self.seen = folder / "seen"
        self.folder = folder
        self.command = ["--config", recipe, f"output_dir={self.output}"]
        self.hook = partial(note_batches, self.seen)

    def start(self, world: int = WORLD, *more: str) -> Ranks:
        return Ranks([*self.command, *more], world, self.folder, self.hook)

    def finish(self, world: int = WORLD, *more: str) -> None:
        succeed([*self.command, *more], world, self.folder, self.hook)

    def logged(self) -> int:
        return max(steps_done(self.output), default=0)

    def saved(self) -> int:
        """The newest checkpoint's step."""
        folders = (self.output / "checkpoints").glob("step-????????")
        return max((int(folder.name.removeprefix("step-")) for folder in folders), default=0)

    def kill_when(self, reached: Callable[[], bool], world: int = WORLD, *more: str) -> None:
        """Kill -9 all ranks as soon as ``reached()``."""
        with self.start(world, *more) as ranks:
            def alive() -> bool:
                return all(process.is_alive() for process in ranks.processes)

            wait_for(lambda: reached() or not alive(), 240, lambda: ranks.output)
            assert alive(), ranks.output
            ranks.kill()


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Run:
    """The run without interruption."""
    run = Run(recipe, tmp_path_factory.mktemp("whole"))
    run.finish()
    assert sorted(steps_done(run.output)) == list(range(1, STEPS + 1))
    assert len(seen(run.seen)) == STEPS * 16
    return run


@pytest.fixture
def copied(whole, recipe, tmp_path) -> Run:
    """A copy of the finished run, to go on from."""
    run = Run(recipe, tmp_path)
    shutil.copytree(whole.output, run.output, symlinks=True)
    return run


def test_killed_at_a_random_step_then_the_same_command(whole, recipe, tmp_path):
    chosen = random.Random(7).randrange(4, STEPS - 1)
    print(f"killed after step {chosen}")
    run = Run(recipe, tmp_path)
    run.kill_when(lambda: run.logged() >= chosen)
    run.finish()
    resumed = events(run.output, "resumed")
    assert len(resumed) == 1 and 0 < resumed[0]["step"] <= chosen + 2
    assert steps_done(run.output) == steps_done(whole.output)  # bit for bit: terms, gradient norm, learning rate
    assert seen(run.seen) == seen(whole.seen)
    expected, got = state(whole.output), state(run.output)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


CHAIN = [  # processes, layout
    (2, "parallel.zero_stage=1"),
    (2, "parallel.tp=2", "parallel.zero_stage=3"),
    (1, "parallel.zero_stage=0", "parallel.recompute=full", "objectives.contrastive.micro_batch=8"),
    (4, "parallel.pp=2", "parallel.schedule=gpipe", "parallel.zero_stage=3"),
    (4, "parallel.tp=2", "parallel.pp=2", "parallel.zero_stage=2", "data.workers=1"),
]


def test_killed_again_and_again_and_resumed_on_other_layouts(whole, recipe, tmp_path):
    """Every layout goes on from a checkpoint that the layout before it wrote."""
    rng = random.Random(11)
    run = Run(recipe, tmp_path)
    for world, *layout in CHAIN[:-1]:
        target = run.saved() + 1 + rng.randrange(2)
        run.kill_when(lambda target=target: run.saved() >= target, world, *layout, "train.checkpoint_every=1")
        print(f"killed with {run.saved()} steps saved on {world} processes, {layout}")
    run.finish(*CHAIN[-1])
    starts = [event["step"] for event in events(run.output, "resumed")]
    assert len(starts) == len(CHAIN) - 1 and 0 < starts[0] and sorted(set(starts)) == starts < [STEPS], starts
    assert seen(run.seen) == seen(whole.seen)
    found = differences(outcome(run), outcome(whole))
    print(found)
    assert found.exact, found


def outcome(run: Run) -> Outcome:
    """What a finished run logged, and its weights and moments."""
    steps = steps_done(run.output)
    assert sorted(steps) == list(range(1, STEPS + 1))
    tensors = state(run.output)
    # The second moments as roots: of the size of the first, not of its square.
    roots = {name: tensor.sqrt() for name, tensor in tensors.items() if name.startswith("exp_avg_sq/")}
    assert len(roots) > 20
    in_order = [steps[step] for step in sorted(steps)]
    return Outcome([s["terms"] for s in in_order], [{"all": s["grad_norm"]} for s in in_order], {**tensors, **roots})


def test_resume_never_starts_over(copied, whole):
    copied.finish(1, "train.resume=never", "train.steps=4")
    assert not events(copied.output, "resumed")
    assert sorted(steps_done(copied.output)) == [1, 2, 3, 4]
    found = steps_done(copied.output)[1]["terms"]
    assert found == pytest.approx(steps_done(whole.output)[1]["terms"], rel=1e-5)
    assert (copied.output / "checkpoints" / "latest").resolve().name == "step-00000004"


def test_a_finished_run_only_evaluates(copied):
    checkpoints = copied.output / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step-00000009")  # as a kill between the last two steps of a save leaves it
    (checkpoints / f"step-{STEPS:08d}.partial-x-1").mkdir()
    copied.finish(1)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest", "step-00000006", "step-00000009", "step-00000012",
    ]
    assert (checkpoints / "latest").resolve().name == f"step-{STEPS:08d}"
    assert events(copied.output, "resumed")[-1]["step"] == STEPS and not seen(copied.seen)
    assert max(steps_done(copied.output)) == STEPS


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(copied, whole):
    damage(copied.output / "checkpoints" / f"step-{STEPS:08d}")
    with copied.start() as ranks:
        assert ranks.wait() == [0] * WORLD, ranks.output
        assert "checkpoint skipped" in ranks.output and "damaged (SHA-256 differs)" in ranks.output
    assert events(copied.output, "resumed")[-1]["step"] == 9
    assert steps_done(copied.output) == steps_done(whole.output)
    assert torch.equal(*(state(run.output)["model/trunk.cls_token"] for run in (copied, whole)))


def test_with_all_checkpoints_damaged_the_run_does_not_start_over_by_itself(copied):
    folders = sorted((copied.output / "checkpoints").glob("step-*"))
    for folder in folders:
        damage(folder)
    ranks = run(copied.command, WORLD, copied.folder)
    assert [process.exitcode for process in ranks.processes] == [2] * WORLD
    assert ranks.output.count("checkpoint skipped") == len(folders) == 3
    assert len(ranks.errors) == WORLD and "train.resume=never" in ranks.errors[0] and "Traceback" not in ranks.output
    assert sorted((copied.output / "checkpoints").glob("step-*")) == folders


@pytest.mark.parametrize(
    "world, change, message",
    [(2, "model.vision.width=48", "has shape"), (1, "model.vision.depth=3", "has no tensor")],
)
def test_a_checkpoint_of_another_model_is_refused(copied, world, change, message):
    before = contents(copied.output)
    ranks = run([*copied.command, change, "train.steps=13"], world, copied.folder)
    assert [process.exitcode for process in ranks.processes] == [2] * world, ranks.output
    assert contents(copied.output) == before  # config.yaml among them
    assert len(ranks.errors) == world and "Traceback" not in ranks.output
    assert all(message in line and "output_dir" in line for line in ranks.errors)


def test_a_run_goes_on_with_fewer_objectives(copied):
    copied.hook = None
    copied.finish(1, "objectives.self_distillation.weight=0", "train.steps=13")
    assert set(steps_done(copied.output)[13]["terms"]) == {"contrastive/loss", "reconstruction/l1"}


def test_changed_data_settings_are_told(copied):
    copied.finish(1, "train.steps=13", "seed=4")
    (event,) = events(copied.output, "data_changed")
    assert event["keys"] == ["seed"] and event["step"] == STEPS


def test_other_shards_are_told_and_moved_ones_are_not(copied, data_root, tmp_path):
    moved = Path(shutil.copytree(data_root, tmp_path / "data"))
    copied.finish(1, f"data.root={moved}", "train.steps=13")
    assert not events(copied.output, "data_changed")
    index = moved / "train" / "index.json"
    first = sorted(moved.glob("train/*.tar"))[0]
    for path in moved.glob(f"train/{first.name}*"):
        path.rename(path.with_name(path.name.replace(first.stem, "renamed")))
    index.write_text(index.read_text().replace(first.stem, "renamed"))
    copied.finish(1, f"data.root={moved}", "train.steps=14")
    (event,) = events(copied.output, "data_changed")
    assert event["keys"] == ["the shards in data.root"] and event["step"] == 13


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def damage(folder: Path) -> None:
    """Flip one bit in the middle of the largest file."""
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
