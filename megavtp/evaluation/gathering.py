"""Every data-parallel rank collects the per-sample results of all."""

import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavtp.parallel.collectives import all_gather
from megavtp.parallel.mesh import Mesh

_CHUNK_ELEMENTS = 2**22  # elements of one exchange, a bound on the device memory beside a training state


def gather_rows(x: Tensor, mesh: Mesh, device: torch.device) -> Tensor:
    """Concatenate the dp ranks' ``x`` (n_rank, ...) in rank order to (sum of n_rank, ...) on the CPU.

    The row counts may differ or be zero. ``device`` is where the collectives run.
    """
    if mesh.dp == 1:
        return x.cpu()
    counts = all_gather(torch.tensor([len(x)], device=device), mesh, "dp").tolist()
    step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(x.shape[1:])))
    pieces: list[list[Tensor]] = [[x[:0].cpu()] for _ in counts]
    for start in range(0, max(counts), step):
        own = x[start : start + step]
        padded = torch.zeros(min(step, max(counts) - start), *x.shape[1:], dtype=x.dtype, device=device)
        padded[: len(own)] = own
        for rank, rows in enumerate(all_gather(padded, mesh, "dp").cpu().chunk(mesh.dp)):
            pieces[rank].append(rows[: max(0, counts[rank] - start)])
    return torch.cat([piece for rank in pieces for piece in rank])


def gather_objects(objects: list[Any], mesh: Mesh, device: torch.device) -> list[Any]:
    """Concatenate the dp ranks' lists of JSON values in rank order. They travel as UTF-8 JSON lines, not as pickle."""
    if mesh.dp == 1:
        return list(objects)
    text = "".join(json.dumps(value) + "\n" for value in objects)
    blob = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())
    return [json.loads(line) for line in bytes(gather_rows(blob, mesh, device).numpy()).splitlines()]
