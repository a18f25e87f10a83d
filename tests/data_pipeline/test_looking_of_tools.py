"""What each rank of evaluation, extraction and sampling does with files, and each writer of a checkpoint: counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from file_operations import LISTINGS, record
from tar_builder import encode, picture
from test_looking import FILES, write_shards

import megavtp
from megavtp.checkpoint.once import opened_once
from megavtp.checkpoint.store import CheckpointStore
from megavtp.config.load import from_dict, to_dict
from megavtp.config.schema import Config
from megavtp.config.validate import check_stored
from megavtp.evaluation.distances.image_sources import open_images
from megavtp.evaluation.tokenizer.checkpoint import CheckpointEvaluation
from megavtp.models.build import build_vtp

TOWER = {"width": 32, "depth": 1, "heads": 2}
WRITERS = 5
RUN = {
    "model": {"image_size": 32, "bottleneck": 8, "vision": TOWER, "decoder": TOWER},
    "objectives": {
        "contrastive": {"weight": 0}, "self_distillation": {"weight": 0},
        "reconstruction": {"perceptual": "lpips-alex", "perceptual_weights": "not there"},
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of many shards, many images, and a checkpoint of several writers."""
    root = tmp_path_factory.mktemp("tools")
    (root / "data").mkdir()
    for split in ("train", "test"):
        write_shards(root / "data" / split)
    (root / "images").mkdir()
    for number in range(FILES):
        (root / "images" / f"{number}.png").write_bytes(encode(picture(seed=number)))
    config = check_stored(from_dict(RUN, Config))
    model = build_vtp(config.model, objectives={"reconstruction"}, seed=3)
    weights = [(f"model/{name}", parameter) for name, parameter in model.named_parameters()]
    _write(root / "checkpoints", [dict(weights[writer::WRITERS]) for writer in range(WRITERS)], to_dict(config))
    return root


def _write(folder: Path, parts: list[dict], config: dict) -> None:
    stores = [CheckpointStore(folder, 2, run_token="all") for _ in parts]
    for writer, (store, tensors) in enumerate(zip(stores, parts)):
        store.save(1, tensors, None if writer else {"config": config}, writer=writer, writers=len(parts))
    for store in stores:
        store.wait()


def _use_all(rank: int, root: Path) -> dict[str, list[tuple[str, str]]]:
    done = record(root)
    found, checkpoint = {}, root / "checkpoints" / "latest"

    def told(what: str) -> None:
        found[what] = [(name, str(Path(path).relative_to(root))) for name, path in done]
        done.clear()

    CheckpointEvaluation(checkpoint, root / "data")
    told("evaluation")
    with opened_once(checkpoint) as opened:
        megavtp.load_tokenizer(checkpoint, opened=opened)
    told("tokenizer")
    open_images(root / "images", 8)
    told("images")
    open_images(root / "data", 8)
    told("shards")
    store = CheckpointStore(root / "written", 2, run_token="all")
    store.save(1, {f"x{rank}": torch.ones(2)}, None if rank else {}, writer=rank, writers=3)
    store.wait()
    told("writing")
    return found


def test_other_ranks_open_what_they_read_and_look_at_nothing(root: Path) -> None:
    first, *others = run_ranks(3, _use_all, root)
    assert sum(path.endswith(".tar") for _, path in first["evaluation"]) == 2 * FILES
    assert sum(path.endswith(".png") for _, path in first["images"]) == FILES
    assert sum(path.endswith(".tar") for _, path in first["shards"]) == FILES
    for rank, found in enumerate(others, 1):
        for what, operations in found.items():
            assert not [path for name, path in operations if name in LISTINGS], what
        assert found["images"] == found["shards"] == []
        for what in ("evaluation", "tokenizer"):
            weights = [(name, Path(path).name) for name, path in found[what] if path.endswith(".safetensors")]
            assert sorted(weights) == [("safe_open", f"tensors-{writer:05d}.safetensors") for writer in range(WRITERS)]
            assert len(found[what]) <= WRITERS + 5, found[what]  # what may lie beside the weights: captions, facts
        folder = "written/step-00000001.partial-all-1"
        own = (f"{folder}/tensors-{rank:05d}.safetensors", f"{folder}/part-{rank:05d}.json")
        assert {path.removesuffix(".partial") for _, path in found["writing"]} <= {folder, *own}, found["writing"]
