"""One rank looks at files, the others are told: what each does is counted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from file_operations import LISTINGS, record
from latent_folder import random_latents
from tar_builder import sample, write_tar

from megavtp.checkpoint.store import CheckpointStore, find_latest, open_checkpoint
from megavtp.data.index import build_index
from megavtp.data.shards import open_dataset
from megavtp.errors import UserError
from megavtp.latents.folder import LatentFolder
from megavtp.parallel import looking
from megavtp.parallel.looking import look_once

FILES = 40
_LOOKS = {
    "shards": open_dataset,
    "latents": LatentFolder,
    "checkpoint": lambda folder: open_checkpoint(find_latest(folder), verify="sizes"),
}


def write_shards(folder: Path, caption: str = "one") -> Path:
    folder.mkdir()
    for number in range(FILES):
        write_tar(folder / f"{number:02d}.tar", sample(f"k{number}", caption))
    build_index(folder)
    return folder


def write_checkpoint(folder: Path) -> Path:
    stores = [CheckpointStore(folder, 2, run_token="all") for _ in range(FILES)]
    for writer, store in enumerate(stores):
        tensors = {f"model/{writer}": torch.full((2,), float(writer))}
        store.save(1, tensors, {} if writer == 0 else None, writer=writer, writers=FILES)
    for store in stores:
        store.wait()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("many")
    return {
        "shards": write_shards(root / "shards"), "latents": random_latents(root / "latents", counts=[2] * FILES),
        "checkpoint": write_checkpoint(root / "checkpoints"),
    }


def _read_last(found) -> float | str:
    if isinstance(found, LatentFolder):
        return found.read(FILES - 1, 1, flip=False).label
    return found.read(FILES - 1, 0).id if hasattr(found, "read") else float(found.tensor(f"model/{FILES - 1}")[0])


def _look_and_read(rank: int, folders: dict[str, Path]) -> dict[str, tuple]:
    if rank == 2:
        os.environ["LOCAL_RANK"] = "0"  # the first rank of another machine, which sees the same files
    results = {}
    for kind, folder in folders.items():
        done = record(folder)
        found = look_once(lambda kind=kind, folder=folder: _LOOKS[kind](folder))
        copy = pickle.loads(pickle.dumps(found))  # what a worker that is not forked gets
        looked = list(done)
        value = _read_last(copy)
        results[kind] = looked, done[len(looked) :], value, copy.digest
    return results


def test_one_rank_looks_at_all_files_and_the_others_at_none(folders):
    ranks = run_ranks(3, _look_and_read, folders)
    for kind, folder in folders.items():
        first, *others = (rank[kind] for rank in ranks)
        names = [os.path.basename(path) for _, path in first[0]]
        ends = {"shards": ".tar", "latents": ".safetensors", "checkpoint": ".safetensors"}[kind]
        assert len({name for name in names if name.endswith(ends)}) == FILES
        assert {"shards": FILES, "latents": FILES, "checkpoint": 4 * FILES}[kind] <= len(names) < 5 * FILES
        for rank, (looked, read, value, digest) in enumerate(others, 1):
            assert [name for name, _ in looked] == ["stat"] * (rank == 2)  # the landmark, once for a machine
            assert (value, digest) == first[2:]
            assert 1 <= len(read) <= 4 and not any(name in LISTINGS for name, _ in read), read
            assert all(str(folder) in path for _, path in read)


def _look_at_own_copy(rank: int, folders: list[Path]) -> tuple[int, str]:
    if rank == 2:
        os.environ["LOCAL_RANK"] = "0"
        looking.place_of = lambda path: None
    done = record(folders[rank])
    try:
        found = look_once(lambda: open_dataset(folders[rank]))
    except UserError as error:
        return len(done), str(error)
    return len(done), found.digest


def test_each_machine_checks_its_own_copy(tmp_path):
    whole, copy = write_shards(tmp_path / "whole"), write_shards(tmp_path / "copy")
    (counts, digests) = zip(*run_ranks(3, _look_at_own_copy, [whole, whole, copy]))
    assert len(set(digests)) == 1 and counts[1] == 0 and min(counts[0], counts[2]) >= FILES
    (copy / "07.tar").unlink()
    (_, errors) = zip(*run_ranks(3, _look_at_own_copy, [whole, whole, copy]))
    assert len(set(errors)) == 1 and "copy/07.tar is missing or has changed" in errors[0]
    build_index(copy)
    (_, errors) = zip(*run_ranks(3, _look_at_own_copy, [whole, whole, copy]))
    assert len(set(errors)) == 1 and f"{whole} on " in errors[0] and "copy it there again" in errors[0]
    (whole / "07.tar").unlink()
    (counts, errors) = zip(*run_ranks(3, _look_at_own_copy, [whole, whole, copy]))
    assert len(set(errors)) == 1 and "whole/07.tar is missing or has changed" in errors[0]
    assert counts[1:] == (0, 0)


def test_a_copy_is_told_from_the_file_by_its_place(tmp_path):
    (tmp_path / "a").write_text("the same")
    (tmp_path / "b").write_text("the same")
    os.link(tmp_path / "a", tmp_path / "c")
    assert looking.place_of(tmp_path / "a") == looking.place_of(tmp_path / "c") != looking.place_of(tmp_path / "b")
    assert looking.place_of(tmp_path / "nothing") is None
