"""From a tokenizer to measured samples, each step by its command on two processes. The launcher starts the same
commands in ``test_readme_runs``."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import yaml
from launched import ROOT, Ranks
from vtp_oracle import TINY

from megavtp.checkpoint.formats.hf_vtp import save_folder
from megavtp.conversion import convert
from megavtp.dit.launcher import train_dit
from megavtp.evaluation.distances import efficientnet
from megavtp.latents.folder import LatentFolder
from megavtp.models.build import build_vtp

sys.path.append(str(Path(__file__).parents[1] / "extraction"))
from picture_shards import GROUPS, write_shards  # noqa: E402

RECIPE = {
    "model": {"width": 48, "depth": 2, "heads": 4}, "data": {"streams": 4, "workers": 0},
    "train": {"steps": 2, "batch_size": 8, "optimizer": {"warmup_steps": 0}}, "telemetry": {"log_every": 1},
}
pytestmark = pytest.mark.timeout(600)


def tool(name: str) -> None:
    """What a process that is started as the tool does."""
    run_path(str(ROOT / "tools" / name), run_name="__main__")


def start(entry, arguments: list, folder: Path) -> str:
    """What the processes printed."""
    with Ranks([str(a) for a in arguments], 2, folder / "ranks", entry=entry) as ranks:
        assert ranks.wait() == [0, 0], ranks.output
    return ranks.output


@pytest.mark.slow
def test_from_a_tokenizer_to_measured_samples(tmp_path):
    pytest.importorskip(efficientnet.PACKAGE)
    save_folder(tmp_path / "vtp", TINY, build_vtp(TINY, objectives={"reconstruction"}).state_dict())
    convert(tmp_path / "vtp", "hf-vtp", tmp_path / "tokenizer")
    shards = write_shards(tmp_path / "shards", [16, 8])

    given = ["--local_rank=0", "--tokenizer", tmp_path / "tokenizer", "--data", shards, "--label", "group"]
    given += ["--out", tmp_path / "latents"]
    said = start(partial(tool, "extract_latents.py"), given, tmp_path)
    assert said.count("24 samples in 1 shards") == 1
    assert LatentFolder(tmp_path / "latents").classes == sorted(GROUPS)

    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(RECIPE))
    given = ["--config", tmp_path / "dit.yaml", f"data.root={tmp_path / 'latents'}", f"output_dir={tmp_path / 'run'}"]
    start(train_dit, given, tmp_path)

    drawn = ["--dit", tmp_path / "run/checkpoints/latest", "--tokenizer", tmp_path / "tokenizer", "--steps", "2"]
    given = [*drawn, "--local_rank=0", "--classes", "all", "--per-class", "2", "--out", tmp_path / "a.npz"]
    said = start(partial(tool, "sample.py"), given, tmp_path)
    assert said.count("wrote 6 images") == 1
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (6, 64, 64, 3)

    evaluate = partial(tool, "evaluate.py")
    told = ["--reference", shards, "--samples", "6", "--batch-size", "2", "--out", tmp_path / "generation.json"]
    start(evaluate, ["--local_rank=0", "generation", *drawn, *told], tmp_path)
    metrics = json.loads((tmp_path / "generation.json").read_text())["metrics"]
    assert metrics["samples"] == 6 and metrics["reference_samples"] == 24
    assert metrics["generation/fd_efficientnet"] > 0

    told = ["--checkpoint", tmp_path / "tokenizer", "--data", tmp_path, "--split", "shards", "--max-samples", "9"]
    said = start(evaluate, ["--local_rank=0", *told, "--out", tmp_path / "tokenizer.json"], tmp_path)
    assert said.count("evaluating on 9 samples") == 1 and said.count("reconstruction/psnr") == 1
    assert json.loads((tmp_path / "tokenizer.json").read_text())["metrics"]["samples"] == 9
