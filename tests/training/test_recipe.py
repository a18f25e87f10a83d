"""``Recipe`` is all that a recipe needs: a toy of one linear layer trains, resumes and replays through ``run``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
from megavtp.parallel.engine import Engine
from megavtp.parallel.passes import Pass
from megavtp.training.metrics_file import read_metrics
from megavtp.training.optimizer import build_optimizer
from megavtp.training.recipe import Recipe
from megavtp.training.replay import NOT_FINITE
from megavtp.training.run import run
from megavtp.training.state import changed_keys
from megavtp.training.telemetry import Telemetry

WIDTH, ROWS, STEPS = 3, 8, 4
OPTIMIZER = OptimizerConfig(lr=0.1, min_lr=0.1, warmup_steps=0, clip_grad=0.0)


@dataclass(frozen=True)
class ToyConfig:
    output_dir: str
    seed: int = 0
    spoilt: int = 0  # the number of a step whose data are NaN
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

    def inputs(self, micro: int) -> dict[str, Any]:
        return {"x": self.x}

    def local_terms(self, outputs: Tensor, micro: int) -> dict[str, Tensor]:
        return {"square": (outputs.squeeze(1) - self.x.sum(1) + self.mean).square().mean()}

    def state(self) -> dict[str, Tensor]:
        return {"sums/mean": self.mean}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.mean = state["sums/mean"]


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
        return [ToyPass()]

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


def test_other_times_are_other_data_to_a_dit():
    then = from_dict({"flow_matching": {"time_mu": 0.0}}, DiTConfig)
    now = from_dict({"flow_matching": {"time_mu": 0.5}, "train": {"steps": 3}}, DiTConfig)
    checkpoint = SimpleNamespace(fact=lambda name, form: json.loads(json.dumps(to_dict(then))))
    assert changed_keys(checkpoint, now, DiTTraining.decides_data) == ["flow_matching.time_mu"]
