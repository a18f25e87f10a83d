"""Training runs through the launcher on one GPU, on every ZeRO stage; those that take longest come last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_run import BASE, merged

from megavtp.data.sources.images import prepare_images

pytestmark = pytest.mark.gpu
LAUNCHER = Path(__file__).parents[2] / "launchers" / "pretrain.py"
RECIPE = {
    "model": {"text": {"vocab_size": None}}, "data": {"workers": 2},
    "train": {"steps": 6, "checkpoint_every": 3}, "telemetry": {"log_every": 1, "pictures_every": 0},
    "parallel": {"compile": "none"},  # which takes longer than the steps, and has a test of its own
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(32):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise number {i}")
    root = folder.parent / "gpu-data"
    prepare_images(folder, root, test_fraction=0.25, vocab_size=320, workers=1, quiet=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged(merged(BASE, RECIPE), {"data": {"root": str(root)}})))
    return path


def train(recipe: Path, folder: Path, *overrides: str) -> list[dict]:
    # The other tests hide the GPU from DeepSpeed; this run is to see it.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, str(LAUNCHER), "--config", str(recipe), f"output_dir={folder}", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return records(folder, "step")


def records(folder: Path, kind: str) -> list[dict]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record["kind"] == kind]


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_bfloat16_trains_and_resumes(recipe, tmp_path, attention):
    options = ("parallel.precision=bf16", "parallel.recompute=full", f"parallel.attention={attention}")
    train(recipe, tmp_path, *options, "train.steps=3")
    lines = train(recipe, tmp_path, *options)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["nonfinite_steps"] == 0 for line in lines)


def test_stages_agree(recipe, tmp_path):
    expected = None
    for stage in range(4):
        lines = train(recipe, tmp_path / str(stage), f"parallel.zero_stage={stage}")
        expected = expected or lines
        for line, reference in zip(lines, expected, strict=True):
            assert line["terms"] == pytest.approx(reference["terms"], rel=1e-3)
            assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
            assert line["tower_grad_norms"] == pytest.approx(reference["tower_grad_norms"], rel=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_blocks_agree(recipe, tmp_path, stage):
    layout = f"parallel.zero_stage={stage}", "parallel.recompute=selective"
    expected = train(recipe, tmp_path / "plain", *layout)
    lines = train(recipe, tmp_path / "compiled", *layout, "parallel.compile=blocks")
    for line, reference in zip(lines, expected, strict=True):
        assert line["terms"] == pytest.approx(reference["terms"], rel=1e-3)
    assert records(tmp_path / "compiled", "compiled")[-1]["step"] <= 3, "a later step has compiled something anew"
