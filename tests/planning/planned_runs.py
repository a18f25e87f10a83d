"""What tiny runs on this world's processes hold and send, to be compared with the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tiny_run import build_engine, data_of, learning_rate, merged, passes_of, tiny_config

from megavtp.config.run import ParallelConfig
from megavtp.config.schema import Config
from megavtp.models.vtp import OBJECTIVES, VTP
from megavtp.parallel.engine import Engine
from megavtp.parallel.engine_state import flat_partitions, inner_optimizer
from megavtp.parallel.mesh import build_mesh
from megavtp.parallel.traffic import Traffic, count_traffic
from megavtp.planning.devices import find_device
from megavtp.planning.plan import Plan, Planner
from megavtp.training.optimizer import parameter_groups
from megavtp.training.step import train_step

BATCH = 16  # of every objective


def layout(world_size: int, micro_batches: int = 1, extra: dict | None = None, **parallel: Any) -> Config:
    """A tiny run. No random number of masked patches and of kept sequences: what is sent is known beforehand."""
    dp = world_size // (parallel.get("tp", 1) * parallel.get("pp", 1))
    size = {"micro_batch": BATCH // dp // micro_batches}
    objectives = {
        "contrastive": size,
        "self_distillation": {**size, "batch": BATCH, "mask_ratio": [0.25, 0.25], "drop_path": 0.0},
        "reconstruction": {**size, "batch": BATCH},
    }
    model = {"vision": {"depth": 4}, "text": {"depth": 2}, "decoder": {"depth": 3}}
    settings = {"model": model, "train": {"batch_size": BATCH}, "objectives": objectives, "parallel": parallel}
    return tiny_config(merged(settings, extra or {}), world_size)


_PLANNERS: dict[str, Planner] = {}


def plan_of(config: Config, world_size: int) -> Plan:
    """By a planner that configurations share which differ in their layout only."""
    whole = {name: replace(getattr(config.objectives, name), micro_batch=None) for name in OBJECTIVES}
    alone = replace(
        config, deepspeed={},
        parallel=ParallelConfig(precision=config.parallel.precision, compile=config.parallel.compile),
        objectives=replace(config.objectives, **whole),
    )
    if repr(alone) not in _PLANNERS:
        _PLANNERS[repr(alone)] = Planner(
            alone, lambda named: parameter_groups(named, config.train.optimizer), find_device("h100"), cuda=False
        )
    return _PLANNERS[repr(alone)].plan(config, world_size)


def state_bytes(engine: Engine, model: VTP) -> dict[str, int]:
    """Bytes of the trained weights, those that the optimizer updates among them, of moments, and of the teacher."""
    inner = inner_optimizer(engine._engine)

    def stored(p: Any) -> Any:
        return getattr(p, "ds_tensor", p)

    trained = [stored(p) for p in model.parameters() if p.requires_grad] + flat_partitions(engine._engine)
    storages = [x.untyped_storage() for x in trained]
    moments = sum(x.nbytes for state in inner.state.values() for x in state.values() if x.dim() > 0)
    return {
        "weights": sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()),
        "optimizer": moments,
        "teacher": sum(stored(p).nbytes for p in model.parameters() if not p.requires_grad),
    }


def by_kind(traffic: Traffic) -> tuple[dict, dict]:
    """Bytes and number of calls, each by (axis, operation)."""
    between_ranks = Traffic(t for t in traffic if t.ranks > 1)
    return dict(between_ranks.sent), dict(between_ranks.messages)


def measure(rank: int, configs: Sequence[Config]) -> list[tuple[int, dict, dict, dict[str, int]]]:
    """Per configuration this rank's pipeline place, the bytes and calls of the second step, and the state it keeps."""
    found = []
    for config in configs:
        p = config.parallel
        mesh = build_mesh(p.tp, p.pp, p.virtual_stages, p.sequence_parallel)
        engine, model = build_engine(config, mesh)
        passes, data = passes_of(config, mesh), data_of(config, mesh)
        for step in range(2):
            with count_traffic(mesh) as traffic:
                train_step(engine, passes, data(step), lr_of=learning_rate(config, step))
        found.append((mesh.pp_rank, *by_kind(traffic), state_bytes(engine, model)))
        engine.close()
    return found
