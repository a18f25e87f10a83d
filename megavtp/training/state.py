"""A run's state in and out of the checkpoint store: layout-free, by logical name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megavtp import __version__
from megavtp.checkpoint.store import Checkpoint, CheckpointStore
from megavtp.config.load import to_dict
from megavtp.config.schema import Config
from megavtp.errors import UserError
from megavtp.json_file import Count
from megavtp.parallel.collectives import all_gather, together
from megavtp.parallel.deepspeed_adapter import MOMENTS
from megavtp.parallel.engine import Engine
from megavtp.parallel.sharding import Shard, cut
from megavtp.training.pretraining import SelfDistillationPass

_CENTER = Shard(0)  # centres are cut like the prototypes


def save(
    store: CheckpointStore, engine: Engine, config: Config, step: int, centers: dict[str, Tensor],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Start a background save of the state after ``step`` steps. Collective: every rank writes its part.

    Saved are the weights, Adam's moments, the EMA teacher and the centres; the data position is the step itself.
    ``facts`` go into the meta data.
    """
    mesh = engine.mesh
    writers, own = mesh.tp * mesh.dp, mesh.dp_rank * mesh.tp + mesh.tp_rank  # of a pipeline stage's tensors
    tensors = engine.export(wanted=lambda number: number % writers == own)
    whole = {f"center/{name}": all_gather(value, mesh, "tp") for name, value in centers.items()}
    if mesh.is_last_stage and own == 0:  # the only stage that knows the centres
        tensors |= whole
    meta = None
    if mesh.rank == 0:
        meta = {"config": to_dict(config), "optimizer_steps": engine.optimizer_steps, "version": __version__, **facts}
    store.save(step, tensors, meta, writer=mesh.rank, writers=mesh.world_size)


def load(checkpoint: Checkpoint, engine: Engine, distillation: SelfDistillationPass | None) -> int:
    """Fill engine and centres from a checkpoint of any layout; returns the step to go on with.

    A converted checkpoint has weights only: the optimizer and the centres then start anew.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    names = set(checkpoint.names)
    weights_only = all(name.startswith("model/") for name in names)

    def tensor(name: str) -> Tensor:
        kind, _, parameter = name.partition("/")
        if weights_only and kind in MOMENTS and f"model/{parameter}" in names:
            return torch.zeros(checkpoint.shape(f"model/{parameter}"))
        return checkpoint.tensor(_known(checkpoint, names, name))

    centers = distillation.centers if distillation and not weights_only else {}
    # What one pipeline rank lacks, others may not.
    together(lambda: _check_names_and_shapes(checkpoint, engine, centers))
    engine.load(tensor, checkpoint.fact("optimizer_steps", Count))
    for name, center in centers.items():
        center.copy_(cut(tensor(f"center/{name}"), _CENTER, engine.mesh.tp_rank, engine.mesh.tp))
    return checkpoint.step


def _known(checkpoint: Checkpoint, names: set[str], name: str) -> str:
    if name not in names:
        raise UserError(
            f"{checkpoint.path} has no tensor {name}: it was trained with other objectives or another model; "
            "set the same model and objectives, or another output_dir"
        )
    return name


def _check_names_and_shapes(checkpoint: Checkpoint, engine: Engine, centers: Mapping[str, Tensor]) -> None:
    names = set(checkpoint.names)
    expected = {f"center/{name}": (len(center) * engine.mesh.tp, *center.shape[1:]) for name, center in centers.items()}
    for name, shape in engine.logical_shapes().items():
        _known(checkpoint, names, f"model/{name}")
        expected |= {f"{kind}/{name}": shape for kind in ("model", *MOMENTS)}
    for name, shape in expected.items():
        if name in names and checkpoint.shape(name) != shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {checkpoint.shape(name)}, this model has {shape}: set the model "
                "keys of the run that wrote it, or another output_dir"
            )


def changed_data_keys(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Keys that decide which data a step sees and that differ from the run that wrote the checkpoint."""
    then = flat_config(checkpoint)
    return [key for key, value in flat(to_dict(config)).items() if _decides_data(key) and then.get(key) != value]


def _decides_data(key: str) -> bool:
    reading = ("data.root", "data.workers", "data.prefetch", "data.max_bad_samples", "data.max_pixels")
    objective_batch = key.startswith("objectives.") and key.endswith(".batch")
    masks = key.startswith("objectives.self_distillation.mask_")
    data = key.startswith("data.") and key not in reading
    return data or masks or objective_batch or key in ("seed", "train.batch_size", "model.image_size")


def flat_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the run that wrote it, of whichever version of MegaVTP, as ``flat`` gives it."""
    return flat(checkpoint.fact("config", dict[str, Any]))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as ``a.b.c`` -> value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        result |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result
