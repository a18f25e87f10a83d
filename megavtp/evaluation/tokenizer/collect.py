"""All ranks run a model over a data set in step and collect a table with a row for each sample."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.data.loader import EvalDataset
from megavtp.data.workers import progress
from megavtp.errors import UserError
from megavtp.evaluation.gathering import gather_objects, gather_rows
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh

_DONE, _READY, _FAILED = 0, 1, 2

Extract = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""This maps images uint8 (b, 3, H, W) and tokens (b, T) to named values per sample (b, ...)."""


@dataclass(frozen=True)
class Table:
    """All samples in the data set's order, which are the same on every rank, for every batch size and layout.

    ``columns`` are named tensors (n, ...) on the CPU.
    """

    index: Tensor
    captions: list[str]
    meta: list[dict[str, Any]]
    columns: dict[str, Tensor]


def collect(
    dataset: EvalDataset, extract: Extract, *, batch_size: int, mesh: Mesh, device: torch.device, quiet: bool = True,
    totals: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> Table:
    """Apply ``extract`` to every sample of ``dataset`` in a collective call. Unless ``quiet``, rank 0 shows progress.

    A value named in ``totals`` is no column: its function gets this rank's samples (b, ...) on ``device``, batch by
    batch, to add them up. So values that are large need not be held.

    Every rank makes the same number of calls, as ZeRO-3 gathers parameters in the forward: a rank that has run
    out of samples computes a blank image and drops the result. Raises ``UserError`` for an empty data set, or if
    another rank cannot read its share.
    """
    index: list[Tensor] = []
    about: list[tuple[str, dict[str, Any]]] = []
    columns: dict[str, list[Tensor]] = {}
    totals = totals or {}
    batches = _in_step(dataset.batches(batch_size, mesh.dp_rank, mesh.dp), mesh, device)
    steps = ceil_div(len(dataset), batch_size * mesh.dp)
    for batch in progress(batches, steps, "evaluation", quiet or mesh.rank > 0):
        images = batch["image"].to(device, non_blocking=True)
        with torch.no_grad():
            values = extract(images, batch["tokens"].to(device, non_blocking=True))
        index.append(batch["index"])
        for name, value in values.items():
            own = value[: len(index[-1])].float()
            if name in totals:
                totals[name](own)
            else:
                columns.setdefault(name, []).append(own.cpu())
        about += zip(batch["caption"], batch["meta"], strict=True)
    if not index:
        raise UserError("evaluation: the data set has no samples; name a split that has some")
    numbers = gather_rows(torch.cat(index), mesh, device)
    about = gather_objects(about, mesh, device)
    rows = np.unique(numbers.numpy(), return_index=True)[1]  # a sample that several ranks read counts once
    return Table(
        numbers[rows], [about[row][0] for row in rows], [about[row][1] for row in rows],
        {name: gather_rows(torch.cat(parts), mesh, device)[rows] for name, parts in columns.items()},
    )


def _in_step(batches: Iterator[dict[str, Any]], mesh: Mesh, device: torch.device) -> Iterator[dict[str, Any]]:
    """Give this rank's batches, then blank ones without rows to keep, until every rank has given its last.

    Before each batch the ranks exchange what they hold. So a rank that fails to read stops all, instead of leaving the
    others in a collective, and a rank without any sample learns the shapes.
    """
    while True:
        batch, failure = None, None
        held = [_DONE, 0, 0, 0, 0]
        try:
            batch = next(batches, None)
        except Exception as error:  # it is raised below, once the other ranks know of it
            failure, held[0] = error, _FAILED
        if batch is not None:
            held = [_READY, *batch["image"].shape[1:], batch["tokens"].shape[1]]
        most = all_reduce(all_reduce(torch.tensor(held, device=device), mesh, "dp", "max"), mesh, "mp", "max")
        state, *shape, tokens = most.tolist()
        if failure is not None:
            raise failure
        if state == _FAILED:
            raise UserError("evaluation: another process could not read its samples; its own message says which")
        if state == _DONE:
            return
        yield batch or {
            "index": torch.empty(0, dtype=torch.long), "image": torch.zeros(1, *shape, dtype=torch.uint8),
            "tokens": torch.zeros(1, tokens, dtype=torch.long), "caption": [], "meta": [],
        }
