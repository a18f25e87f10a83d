"""What a run saw, noted by its ranks, and what it held; ``partial(note_batches, folder)`` is a ``launched.Hook``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megavtp.checkpoint.store import open_checkpoint
from megavtp.data.batch import Batch
from megavtp.training.trainer import Trainer

Seen = dict[tuple[int, int], list]  # (step, position in the global batch) -> name and digests


def note_batches(folder: Path, rank: int) -> None:
    """From now on every step of this process leaves a line in ``folder`` before it is computed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / f"rank{rank}-{os.getpid()}.jsonl", "a")
    compute = Trainer._step

    def step(self, batch, loader):
        file.write(json.dumps([batch.step, dict(_samples(batch))]) + "\n")
        file.flush()
        compute(self, batch, loader)

    Trainer._step = step


def seen(folder: Path) -> Seen:
    """All that the ranks of all starts saw. Who saw the same place of the same step must have seen the same."""
    found: Seen = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            for position, what in samples.items():
                assert found.setdefault((step, int(position)), what) == what, f"step {step}, position {position}"
    return found


def state(output_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint: weights, moments, teacher."""
    with open_checkpoint(output_dir / "checkpoints" / "latest") as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names}


def _samples(batch: Batch) -> Iterator[tuple[int, list]]:
    """(place in the global batch, [name, image, tokens, crops and masks, reconstructed?]) of this rank's samples."""
    slots = {row: slot for slot, row in enumerate(batch.ssl_rows.tolist())}
    reconstructed = set(batch.rec_rows.tolist())
    for row, position in enumerate(batch.positions.tolist()):
        slot = slots.get(row)
        views = "" if slot is None else _digest(
            batch.global_crops[:, slot], batch.local_crops[:, slot], batch.masks[:, slot]
        )
        plain = _digest(batch.images[row]), _digest(batch.tokens[row])
        yield position, [batch.ids[row], *plain, views, row in reconstructed]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
