"""A run's state in the checkpoint store, by logical name and independent of the layout."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megavtp import __version__
from megavtp.checkpoint.store import Checkpoint, CheckpointStore
from megavtp.config.load import to_dict
from megavtp.config.run import RunConfig
from megavtp.errors import UserError
from megavtp.json_file import Count
from megavtp.parallel.collectives import all_gather, together
from megavtp.parallel.engine import Engine
from megavtp.parallel.engine_state import MOMENTS
from megavtp.parallel.passes import Pass
from megavtp.parallel.sharding import cut, whole_shape


def save(
    store: CheckpointStore, engine: Engine, passes: Sequence[Pass], config: RunConfig, step: int,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Start a background save of the state after ``step`` steps; every rank calls this and writes its part.

    It saves the weights, Adam's moments, the average and what the passes carry from step to step; the data position is
    the step itself. ``facts`` go into the meta data.
    """
    mesh = engine.mesh
    writers, own = mesh.tp * mesh.dp, mesh.dp_rank * mesh.tp + mesh.tp_rank  # of a stage's tensors
    tensors = engine.export(wanted=lambda number: number % writers == own)
    carried = {
        name: value if objective.state_shard is None else all_gather(value, mesh, "tp")
        for objective in passes for name, value in objective.state().items()
    }
    if mesh.is_last_stage and own == 0:
        tensors |= carried
    meta = None
    if mesh.rank == 0:
        meta = {"config": to_dict(config), "optimizer_steps": engine.optimizer_steps, "version": __version__, **facts}
    store.save(step, tensors, meta, writer=mesh.rank, writers=mesh.world_size)


def load(checkpoint: Checkpoint, engine: Engine, passes: Sequence[Pass]) -> int:
    """Fill engine and passes from a checkpoint of any layout; return the step to go on with.

    A converted checkpoint has weights only: the optimizer and the passes then start anew.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    weights_only = all(name.startswith("model/") for name in checkpoint.names)

    def tensor(name: str) -> Tensor:
        kind, _, parameter = name.partition("/")
        if weights_only and kind in MOMENTS:
            return torch.zeros(checkpoint.shape(f"model/{parameter}"))
        return checkpoint.tensor(name)

    carried = [(objective, {} if weights_only else objective.state()) for objective in passes]
    shapes = {
        name: whole_shape(value.shape, objective.state_shard, engine.mesh.tp)
        for objective, own in carried for name, value in own.items()
    }
    # One pipeline rank may miss a tensor that others do not.
    together(lambda: _check_names_and_shapes(checkpoint, engine, shapes))
    engine.load(tensor, checkpoint.fact("optimizer_steps", Count))
    for objective, own in carried:
        if own:
            objective.load_state({
                name: cut(tensor(name), objective.state_shard, engine.mesh.tp_rank, engine.mesh.tp).to(value.device)
                for name, value in own.items()
            })
    return checkpoint.step


def _check_names_and_shapes(checkpoint: Checkpoint, engine: Engine, carried: Mapping[str, tuple[int, ...]]) -> None:
    names = set(checkpoint.names)
    logical = engine.logical_shapes()
    required = {**carried, **{f"model/{name}": shape for name, shape in logical.items()}}
    for name in required:
        if name not in names:
            raise UserError(
                f"{checkpoint.path} has no tensor {name}: it was trained with other objectives or another model; "
                "set the same model and objectives, or another output_dir"
            )
    trained = {f"{kind}/{name}": shape for name, shape in logical.items() for kind in MOMENTS}  # or not
    for name, shape in (required | trained).items():
        if name in names and checkpoint.shape(name) != shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {checkpoint.shape(name)}, this model has {shape}: set the model "
                "keys of the run that wrote it, or another output_dir"
            )


def changed_keys(checkpoint: Checkpoint, config: RunConfig, decides: Callable[[str], bool]) -> list[str]:
    """Return the keys for which ``decides`` holds and whose values differ from the run that wrote the checkpoint."""
    then = flat_config(checkpoint)
    return [key for key, value in flat(to_dict(config)).items() if decides(key) and then.get(key) != value]


def checkpoint_root(config: RunConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


def decides_samples(key: str) -> bool:
    """Tell whether a key that every recipe has decides which samples a step sees, or what is drawn for them."""
    reading = ("data.root", "data.source", "data.workers", "data.prefetch", "data.max_bad_samples", "data.max_pixels")
    return (key.startswith("data.") and key not in reading) or key in ("seed", "train.batch_size")


def flat_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the flat configuration of the run that wrote it, whichever version of MegaVTP that was."""
    return flat(checkpoint.fact("config", dict[str, Any]))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to ``a.b.c`` -> value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        result |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result
