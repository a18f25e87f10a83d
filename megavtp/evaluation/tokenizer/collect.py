"""All ranks run a model over a data set in step and collect a table with a row for each sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.data.workers import progress
from megavtp.errors import UserError
from megavtp.evaluation.gathering import gather_objects, gather_rows
from megavtp.evaluation.tokenizer.interface import EvaluationSet, Probe
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh

_DONE, _READY, _FAILED = 0, 1, 2


@dataclass(frozen=True)
class Table:
    """All samples in the data set's order, which are the same on every rank, for every batch size and layout.

    ``columns`` are named tensors (n, ...) on the CPU.
    """

    index: Tensor
    captions: list[str]
    meta: list[dict[str, Any]]
    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.captions)


def collect(
    dataset: EvaluationSet, probe: Probe, *, batch_size: int, mesh: Mesh, device: torch.device, quiet: bool = True
) -> Table:
    """Apply ``probe`` to every sample of ``dataset`` in a collective call. Unless ``quiet``, rank 0 shows progress.

    Every rank makes the same number of probe calls, as ZeRO-3 gathers parameters in the forward: a rank that has run
    out of samples computes a blank image and drops the result. Raises ``UserError`` for an empty data set, or if
    another rank cannot read its share.
    """
    index: list[Tensor] = []
    about: list[dict[str, Any]] = []
    columns: dict[str, list[Tensor]] = {}
    batches = _in_step(dataset.batches(batch_size, mesh.dp_rank, mesh.dp), mesh, device)
    steps = ceil_div(len(dataset), batch_size * mesh.dp)
    for batch in progress(batches, steps, "evaluation", quiet or mesh.rank > 0):
        images = batch["image"].to(device, non_blocking=True)
        with torch.no_grad():
            values = probe(images, batch["tokens"].to(device, non_blocking=True))
        count = len(batch["index"])
        for name, value in values.items():
            columns.setdefault(name, []).append(value[:count].float().cpu())
        index.append(batch["index"])
        about += [{"caption": c, "meta": m} for c, m in zip(batch["caption"], batch["meta"], strict=True)]
    if not index:
        raise UserError("evaluation: the data set has no samples; name a split that has some")
    return _merge(torch.cat(index), about, {k: torch.cat(v) for k, v in columns.items()}, mesh, device)


def _merge(index: Tensor, about: list[dict], columns: dict[str, Tensor], mesh: Mesh, device: torch.device) -> Table:
    """Sort all ranks' rows by ``index``; a sample that several ranks read counts once."""
    index = gather_rows(index, mesh, device)
    about = gather_objects(about, mesh, device)
    columns = {name: gather_rows(value, mesh, device) for name, value in columns.items()}
    order = torch.argsort(index, stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    order, index = order[first], index[first]
    about = [about[i] for i in order.tolist()]
    return Table(
        index, [a["caption"] for a in about], [a["meta"] for a in about],
        {name: value[order] for name, value in columns.items()},
    )


def _in_step(batches: Iterator[dict[str, Any]], mesh: Mesh, device: torch.device) -> Iterator[dict[str, Any]]:
    """Give this rank's batches, then blank ones without rows to keep, until every rank has given its last.

    Before each batch the ranks exchange what they hold. So a rank that fails to read stops all, instead of leaving the
    others in a collective, and a rank without any sample learns the shapes.
    """
    while True:
        batch, failure = None, None
        state = [_DONE, 0, 0, 0, 0]
        try:
            batch = next(batches, None)
        except Exception as error:  # it is raised below, once the other ranks know of it
            failure, state[0] = error, _FAILED
        if batch is not None:
            state = [_READY, *batch["image"].shape[1:], batch["tokens"].shape[1]]
        agreed = _max_over_ranks(state, mesh, device)
        if failure is not None:
            raise failure
        if agreed[0] == _FAILED:
            raise UserError("evaluation: another process could not read its samples; its own message says which")
        if agreed[0] == _DONE:
            return
        yield _blank(*agreed[1:]) if batch is None else batch


def _max_over_ranks(values: list[int], mesh: Mesh, device: torch.device) -> list[int]:
    x = torch.tensor(values, device=device)
    return all_reduce(all_reduce(x, mesh, "dp", "max"), mesh, "mp", "max").tolist()


def _blank(channels: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    return {
        "index": torch.empty(0, dtype=torch.long), "image": torch.zeros(1, channels, height, width, dtype=torch.uint8),
        "tokens": torch.zeros(1, tokens, dtype=torch.long), "caption": [], "meta": [],
    }
