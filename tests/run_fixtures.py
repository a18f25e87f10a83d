"""A small real data set, and the recipe of a run on it that takes a second."""

import io

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_run import BASE, merged

from megavtp.data.sources.images import prepare_images

RECIPE = {
    "model": {"text": {"vocab_size": None}},
    "data": {"streams": 4, "workers": 0, "shuffle_block": 8},
    "train": {"steps": 12, "checkpoint_every": 3, "keep_last": 3},
    "telemetry": {"log_every": 1, "pictures_every": 0},
    "evaluation": {"at_end": False},
}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Forty smooth 40 x 36 pictures, ten of them held out, each with a caption of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((36, 40), Image.BILINEAR).save(file, "PNG")
        (folder / f"{i}.png").write_bytes(file.getvalue())
        (folder / f"{i}.txt").write_text(f"blurred pattern number {i}")
    root = tmp_path_factory.mktemp("data") / "set"
    prepare_images(
        folder, root, test_fraction=0.25, vocab_size=320, shard_size=16, workers=1, quiet=True,
    )
    return root


@pytest.fixture(scope="session")
def recipe(data_root, tmp_path_factory):
    """The recipe's file. Commands: ["--config", recipe, "output_dir=...", ...]."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged(merged(BASE, RECIPE), {"data": {"root": str(data_root)}})))
    return str(path)
