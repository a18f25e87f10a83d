"""``Recipe`` is all that a recipe needs: a toy of one linear layer trains, resumes and replays through ``run``."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from distributed import run_ranks
from torch import Tensor, nn

from megavtp.checkpoint.store import Checkpoint, open_checkpoint
from megavtp.config.load import from_dict, to_dict
from megavtp.config.run import LoggingConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megavtp.dit.config import DiTConfig
from megavtp.dit.recipe import DiTTraining
from megavtp.launch.ranks import STOPPED
from megavtp.parallel.engine import Engine
from megavtp.parallel.passes import Pass
from megavtp.training.metrics_file import read_metrics
from megavtp.training.optimizer import build_optimizer
from megavtp.training.recipe import Recipe
from megavtp.training.replay import NOT_FINITE
from megavtp.training.run import run
from megavtp.training.state import changed_keys
from megavtp.training.telemetry import Telemetry
from megavtp.training.watch import PATIENCE, Watch

WIDTH, ROWS, STEPS = 3, 8, 4
OPTIMIZER = OptimizerConfig(lr=0.1, min_lr=0.1, warmup_steps=0, clip_grad=0.0)


@dataclass(frozen=True)
class ToyConfig:
    output_dir: str
    seed: int = 0
    spoilt: int = 0  # the number of a step whose data are NaN
    told_to_stop: int = 0  # the number of a step in which a signal comes
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(precision="fp32"))
    train: TrainConfig = TrainConfig(steps=STEPS, batch_size=ROWS, optimizer=OPTIMIZER)
    telemetry: LoggingConfig = LoggingConfig(log_every=1)
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToyBatch:
    step: int
    x: Tensor  # (ROWS, WIDTH)
    ids: tuple[str, ...] = ("numbers",)


class ToyLoader:
    wait_seconds = 0.0

    def __init__(self, config: ToyConfig, start: int):
        self.config, self.start = config, start

    def __iter__(self) -> Iterator[ToyBatch]:
        for step in range(self.start, self.config.train.steps):
            x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(self.config.seed + step))
            yield ToyBatch(step, x * torch.nan if step + 1 == self.config.spoilt else x)

    bad_samples: frozenset[str] = frozenset()

    def close(self) -> None:
        pass


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, mode: str, x: Tensor) -> Tensor:
        return self.layer(x)


class ToyPass(Pass):
    """The sum of each row, less its running mean over the steps, which is the state."""

    name, mode, weight = "sums", "sums", 1.0

    def __init__(self):
        self.mean = torch.zeros(1)

    def prepare(self, run: Any, batch: ToyBatch) -> int:
        self.x, self.mean = batch.x, 0.5 * self.mean + 0.5 * batch.x.sum(1).mean()
        return 1

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        return {"x": self.x}

    def local_terms(self, outputs: Tensor, micro: int) -> dict[str, Tensor]:
        return {"square": (outputs.squeeze(1) - self.x.sum(1) + self.mean).square().mean()}

    def state(self) -> dict[str, Tensor]:
        return {"sums/mean": self.mean}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.mean = state["sums/mean"]


class ToldToStop(ToyPass):
    """Its process gets a SIGTERM in one step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def prepare(self, run: Any, batch: ToyBatch) -> int:
        if batch.step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(run, batch)


class ToyRecipe(Recipe):
    config: ToyConfig

    def open(self) -> None:
        pass

    def build(self) -> None:
        torch.manual_seed(0)
        model = ToyModel()
        optimizer = build_optimizer(model.named_parameters(), self.config.train.optimizer)
        self.engine = Engine.of_run(model, optimizer, self.mesh, self.config, leaf_classes=())

    def passes(self) -> list[Pass]:
        return [ToldToStop(self.config.told_to_stop)]

    def data_digest(self) -> str:
        return "sums"

    def loader(self, start: int) -> ToyLoader:
        return ToyLoader(self.config, start)

    def flops_per_step(self) -> float:
        return 6.0 * WIDTH * ROWS

    @staticmethod
    def decides_data(key: str) -> bool:
        return key in ("seed", "spoilt")

    def check(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.fact("toy", bool)

    def facts(self) -> dict[str, Any]:
        return {"toy": True}

    def finish(self, telemetry: Telemetry) -> None:
        Path(self.config.output_dir, "finished").touch()


def _train(config: ToyConfig, replay: int | None = None) -> int:
    return run(ToyRecipe(config, torch.device("cpu")), replay)


def _on_a_rank(rank: int, folder: Path) -> dict[str, int]:
    whole, parts = ToyConfig(str(folder / "whole")), ToyConfig(str(folder / "parts"))
    status = {"whole": _train(whole)}
    status["half"] = _train(replace(parts, train=replace(parts.train, steps=STEPS // 2)))
    status["other half"] = _train(parts)
    before = _content(folder)
    status["replayed"] = _train(parts, replay=STEPS // 2 + 1)
    status["replayed, spoilt"] = _train(replace(parts, spoilt=STEPS - 1), replay=STEPS - 1)
    assert _content(folder) == before, "a replay writes nothing"
    status["other data"] = _train(replace(parts, seed=1, train=replace(parts.train, steps=STEPS + 1)))
    return status


def _content(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _tensors(folder: Path, step: int) -> dict[str, Tensor]:
    with open_checkpoint(folder / "checkpoints" / f"step-{step:08d}") as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names}


def test_a_toy_recipe_trains_resumes_and_replays(tmp_path):
    (status,) = run_ranks(1, _on_a_rank, tmp_path, timeout=100)
    assert status.pop("replayed, spoilt") == NOT_FINITE and set(status.values()) == {0}
    whole, parts = (_tensors(tmp_path / name, STEPS) for name in ("whole", "parts"))
    assert {"sums/mean", "model/layer.weight", "exp_avg/layer.bias"} <= whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert float(whole["sums/mean"]) != 0 and (tmp_path / "whole" / "finished").exists()
    records = list(read_metrics(tmp_path / "parts" / "metrics.jsonl"))
    losses = {record["step"]: record["terms"]["sums/square"] for record in records if record["kind"] == "step"}
    assert list(losses) == list(range(1, STEPS + 2)) and losses[STEPS] < losses[1]
    started = [record for record in records if record["kind"] == "started"]
    assert [record["step"] for record in started] == sorted(record["step"] for record in started)
    assert started[0]["step"] == 0 and len(started) > 1 and started[0]["layout"]["processes"] == 1
    (changed,) = (record for record in records if record["kind"] == "data_changed")
    assert (changed["step"], changed["keys"]) == (STEPS, ["seed"])


def _told_to_stop(rank: int, folder: Path) -> list[tuple[int, str]]:
    """Statuses and messages of two runs: a signal comes in the first step, and in the last."""
    found = []
    for step in (1, STEPS):
        with redirect_stderr(io.StringIO()) as said:
            status = _train(ToyConfig(str(folder / str(step)), told_to_stop=step))
        found.append((status, said.getvalue()))
    return found


def test_a_signal_stops_a_run_only_while_a_step_is_left(tmp_path):
    ((early, last),) = run_ranks(1, _told_to_stop, tmp_path, timeout=100)
    assert early[0] == STOPPED and f"not finished: stopped after step 2 of {STEPS} (SIGTERM), which is" in early[1]
    assert last[0] == 0 and f"told to stop (SIGTERM), but all {STEPS} steps are done and saved" in last[1]
    assert [(tmp_path / str(step) / "finished").exists() for step in (1, STEPS)] == [False, True]
    assert _tensors(tmp_path / "1", 2) and _tensors(tmp_path / str(STEPS), STEPS)


class Watched(ToyRecipe):
    def watches(self) -> list[Watch]:
        return [Watch("sums/square", 1e9, 1, "the loss is only {value}", "try more")]


def _watched(rank: int, folder: Path) -> int:
    train = TrainConfig(steps=PATIENCE + 3, batch_size=ROWS, optimizer=OPTIMIZER)
    return run(Watched(ToyConfig(str(folder), train=train), torch.device("cpu")))


def test_a_recipes_watches_warn_in_its_run(tmp_path):
    assert run_ranks(1, _watched, tmp_path, timeout=100) == [0]
    (warning,) = (record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "warning")
    assert warning["step"] == 1 + PATIENCE and warning["message"].startswith("the loss is only ")


def test_other_times_are_other_data_to_a_dit():
    then = from_dict({"flow_matching": {"time_mu": 0.0}}, DiTConfig)
    now = from_dict({"flow_matching": {"time_mu": 0.5}, "train": {"steps": 3}}, DiTConfig)
    checkpoint = SimpleNamespace(fact=lambda name, form: json.loads(json.dumps(to_dict(then))))
    assert changed_keys(checkpoint, now, DiTTraining.decides_data) == ["flow_matching.time_mu"]
