"""A reference's features are kept in a file, so that the network runs over its images once for many sets of samples."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megavtp.errors import UserError
from megavtp.evaluation.distances.feature_sets import FeatureStatistics, FeatureSummary
from megavtp.evaluation.report import write_file
from megavtp.parallel.collectives import together
from megavtp.parallel.looking import from_first
from megavtp.parallel.mesh import Mesh


def read_or_make(
    path: Path, facts: dict[str, str], make: Callable[[], FeatureSummary], device: torch.device, mesh: Mesh
) -> FeatureSummary:
    """Read the features in a file, or ``make`` them and write it, in a collective call with the same result either way.

    ``facts`` tell which images they are of and by which network. Raises ``UserError`` on every rank if the file has
    those of others, or is damaged.
    """
    if from_first(lambda: _is_there(path)):
        return together(lambda: _read(path, facts, device))
    found = make()
    together(lambda: _write(path, facts, found) if mesh.rank == 0 else None)
    return found


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path} cannot be reached ({error.strerror}); name another file") from None


def _read(path: Path, facts: dict[str, str], device: torch.device) -> FeatureSummary:
    try:
        with safe_open(path, framework="pt") as file:
            held = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(
            f"{path} is not seen on {socket.gethostname()}; name a file on storage that all machines share"
        ) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} holds no reference's features ({error}); remove it, to have them made anew") from None
    for name in facts:
        if held.get(name) != facts[name]:
            raise UserError(
                f"{path} holds features of another reference ({name}: {held.get(name, 'not told')}, not "
                f"{facts[name]}); name another file, or remove it"
            )
    if tensors.keys() != {"mean", "covariance", "features", "numbers"}:
        raise UserError(f"{path} holds other tensors than a reference's features; remove it, to have them made anew")
    statistics = FeatureStatistics(tensors["mean"], tensors["covariance"], int(held["count"]))
    return FeatureSummary(statistics, tensors["features"], tensors["numbers"].cpu())


def _write(path: Path, facts: dict[str, str], found: FeatureSummary) -> None:
    tensors = {
        "mean": found.statistics.mean, "covariance": found.statistics.covariance, "features": found.features,
        "numbers": found.numbers,
    }
    facts = {**facts, "count": str(found.statistics.count)}
    # Several commands that measure against one reference may start at the same time, and each may write the file.
    own = path.with_name(f"{path.stem}-{socket.gethostname()}-{os.getpid()}{path.suffix}")
    write_file(own, save({name: tensor.contiguous() for name, tensor in tensors.items()}, facts))
    try:
        os.replace(own, path)
    except OSError as error:
        own.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None
