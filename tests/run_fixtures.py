"""A small real data set, the recipe of a run on it that takes a second, and a SLURM."""

import sys

import numpy as np
import pytest
import slurm_cluster
import yaml
from tiny_run import BASE, blurred_picture, merged

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
    """Forty pictures, ten of them held out, each with a caption of its own. Stark ones: the predictions of a short run
    stay near grey, and do not meet a pixel, where the slope of L1 jumps."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.png").write_bytes(blurred_picture(rng, stark=True))
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment |= {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHON": sys.executable}
        yield cluster
