"""A file keeps a reference's mean and covariance: ADM's .npz with arrays ``mu`` (d,) and ``sigma`` (d, d)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megavtp.errors import UserError
from megavtp.evaluation.distances.frechet import FeatureStatistics
from megavtp.evaluation.distances.network import INCEPTION
from megavtp.evaluation.distances.npz_images import npz_errors

_REMEDY = "give a reference of the same network, or its images"


def read_statistics(path: str | Path, network: str, dims: int) -> FeatureStatistics | None:
    """Read the statistics in the file to the CPU; None if it has none (ADM's files also hold images).

    In a file that does not name the network, as ADM's, they are of Inception's features. Nothing is unpickled.
    ``UserError`` if the file is damaged, or its statistics are another network's.
    """
    with npz_errors(path, "no whole .npz file of plain arrays"), np.load(path, allow_pickle=False) as arrays:
        if not {"mu", "sigma"} <= set(arrays.files):
            return None
        made_by = str(arrays["network"]) if "network" in arrays.files else INCEPTION
        count = int(arrays["count"]) if "count" in arrays.files else None
        mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
    if made_by != network:
        raise UserError(f"{path} holds statistics of {made_by} features, these images' are {network}'s; {_REMEDY}")
    if mean.shape != (dims,) or covariance.shape != (dims, dims):
        raise UserError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape} do not belong to {dims} features; {_REMEDY}"
        )
    if not (np.isfinite(mean).all() and np.allclose(covariance, covariance.T)):
        raise UserError(f"{path}: mu is not finite or sigma is no symmetric matrix; copy or write it again")
    return FeatureStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), count)


def write_statistics(path: str | Path, statistics: FeatureStatistics, network: str) -> None:
    """Write a file for ``read_statistics``, ADM's and other FID scripts, and rename it into place when complete."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: statistics go into an .npz file; name one")
    partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
    arrays: dict[str, Any] = {
        "mu": statistics.mean.cpu().numpy(), "sigma": statistics.covariance.cpu().numpy(), "network": network,
    }
    if statistics.count is not None:  # None would be pickled, which no reader allows
        arrays["count"] = statistics.count
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None
    finally:
        partial.unlink(missing_ok=True)
