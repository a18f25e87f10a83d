"""What each rank of a run does with the files of its data and checkpoints, when it starts and when it goes on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from file_operations import LISTINGS, record
from launched import succeed
from tiny_run import blurred_picture

from megavtp.data.sources.images import prepare_images

pytestmark = pytest.mark.timeout(600)
ASKING = ("stat", "lstat", *LISTINGS)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    folder, root = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("data") / "set"
    for number in range(40):
        (folder / f"{number}.png").write_bytes(blurred_picture(np.random.default_rng(number), stark=True))
        (folder / f"{number}.txt").write_text(f"blurred pattern number {number}")
    prepare_images(folder, root, test_fraction=0.25, vocab_size=320, shard_size=2, workers=1, quiet=True)
    return root


def _note_until_the_first_batch(data: Path, run: Path, notes: Path, rank: int) -> None:
    """Record what a rank does before its first step; the checkpoint's reading is a part of it."""
    from megavtp.training.trainer import Trainer

    done = {"data": record(data), "checkpoints": record(run / "checkpoints")}
    train = Trainer.run

    def noted(trainer: Trainer, start: int) -> bool:
        (notes / f"{start}-{rank}.json").write_text(json.dumps(done))
        return train(trainer, start)

    Trainer.run = noted


def test_one_rank_asks_for_all_files(recipe, many_shards, tmp_path):
    run, notes = tmp_path / "run", tmp_path / "notes"
    notes.mkdir()
    hook = partial(_note_until_the_first_batch, many_shards, run, notes)
    command = ["--config", recipe, f"output_dir={run}", f"data.root={many_shards}"]
    succeed([*command, "train.steps=3"], 2, tmp_path, hook)
    succeed([*command, "train.steps=4"], 2, tmp_path, hook)
    for start in (0, 3):
        first, other = (json.loads((notes / f"{start}-{rank}.json").read_text()) for rank in (0, 1))
        tars = [path for name, path in first["data"] if name == "stat" and path.endswith(".tar")]
        assert len(tars) == len(set(tars)) == 20  # 15 of the train split, and 5 of the test split
        asked = [(name, path) for name, path in other["data"] if name in ASKING]
        assert len(asked) <= 4 and not any(path.endswith(".tar") for _, path in other["data"]), asked
        asked = [(name, path) for name, path in other["checkpoints"] if name in ASKING or path.endswith(".json")]
        assert not asked
    assert any(name in LISTINGS for name, _ in first["checkpoints"])
    read = [path for name, path in other["checkpoints"]]  # rank 1 only opens the files whose tensors it takes
    assert read and all(path.endswith(".safetensors") for path in read) and len(set(read)) == len(read)
