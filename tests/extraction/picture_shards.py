"""Data sets of tiny pictures with metadata."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from megavtp.data.index import build_index

GROUPS = ["flags", "animals", "food & drink"]


def describe(i: int) -> dict:
    return {"group": GROUPS[i % 3], "number": 7 * (i % 3), "name": f"picture {i}"}


def write_shards(
    folder: Path, counts: list[int], bad: tuple[int, ...] = (), meta: Callable[[int], dict] = describe
) -> Path:
    """``bad``: numbers of pictures whose bytes are no image."""
    folder.mkdir(parents=True)
    draw, number = torch.Generator().manual_seed(0), 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"shard-{shard:06d}.tar", "w") as tar:
            for _ in range(count):
                file = io.BytesIO()
                pixels = torch.randint(0, 256, (10, 12, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(file, "PNG")
                image = b"no image" if number in bad else file.getvalue()
                about = meta(number)
                members = {"png": image, "txt": f"caption {number}".encode(), "json": json.dumps(about).encode()}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    build_index(folder)
    return folder
