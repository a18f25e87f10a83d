"""Measure how long rank 0 takes to look at a data set of many shards, and the others to be told.

    python benchmarks/opening.py --shards 27700 --latents 27700

The shards are as long as real ones and have no content: a look reads none. Files are made in a temporary folder.
"""

import argparse
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

import torch
from safetensors.torch import save_file

from megavtp.data.files import write_json
from megavtp.data.shards import open_dataset
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact
from megavtp.latents.folder import LatentFolder

BYTES, SAMPLES = 2**30, 10_000  # of a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=27_700, help="of a data set (default: 27700)")
    parser.add_argument("--latents", type=int, default=2_770, help="of a folder of latents (default: 2770)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(f"{options.shards:,} shards", make_shards(Path(folder, "shards"), options.shards), open_dataset)
        report(f"{options.latents:,} latents", make_latents(Path(folder, "latents"), options.latents), LatentFolder)


def make_shards(folder: Path, count: int) -> Path:
    folder.mkdir()
    names = [f"shard-{number:06d}.tar" for number in range(count)]
    for name in names:
        (folder / f"{name}.index.json").touch()
        with open(folder / name, "wb") as file:
            file.truncate(BYTES)
    shards = [{"file": name, "samples": SAMPLES, "bytes": BYTES} for name in names]
    write_json(folder / "index.json", {"version": 1, "total": count * SAMPLES, "shards": shards})
    return folder


def make_latents(folder: Path, count: int) -> Path:
    folder.mkdir()
    statistics = LatentStatistics((0.0,) * 8, (1.0,) * 8)
    TokenizerArtifact("none", 32, 16, 8, statistics=statistics).write(folder)
    for number in range(count):
        tensors = {"latents": torch.zeros(2, 8, 2, 2), "labels": torch.zeros(2, dtype=torch.long)}
        save_file(tensors, folder / f"latents_rank00_shard{number:06d}.safetensors")
    return folder


def report(what: str, folder: Path, look: Callable[[Path], Any]) -> None:
    start, core = time.perf_counter(), time.process_time()
    found = look(folder)
    looked, core = time.perf_counter() - start, time.process_time() - core
    start = time.process_time()
    sent = pickle.dumps(found)
    pickle.loads(sent)
    told = time.process_time() - start
    print(f"{what}: looked in {looked:.2f} s ({core:.2f} s of processors); told {len(sent):,} bytes in {told:.2f} s")


if __name__ == "__main__":
    main()
