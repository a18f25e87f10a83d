"""A run over pipeline ranks from the launcher to the last picture: it says and leaves what one process does."""

import json

import pytest
from launched import steps_done, succeed
from PIL import Image, ImageChops

STEPS = 3
SETTINGS = [
    f"train.steps={STEPS}", "train.checkpoint_every=0", "telemetry.pictures_every=2", "evaluation.at_end=true",
    "evaluation.batch_size=4", "objectives.contrastive.micro_batch=8",
]


def start(recipe, folder, world, *layout):
    output = folder / "run"
    succeed(["--config", recipe, f"output_dir={output}", *SETTINGS, *layout], world, folder)
    return output


def test_pipeline_run(recipe, tmp_path):
    alone = start(recipe, tmp_path / "alone", 1, "parallel.zero_stage=0")
    piped = start(recipe, tmp_path / "piped", 2, "parallel.pp=2", "parallel.zero_stage=3", "parallel.schedule=gpipe")
    expected, got = steps_done(alone), steps_done(piped)
    assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert got[step]["terms"] == pytest.approx(values["terms"], rel=1e-5, abs=1e-5)
        assert got[step]["tower_grad_norms"] == pytest.approx(values["tower_grad_norms"], rel=1e-4)
    metrics = [json.loads((folder / "evaluation.json").read_text()) for folder in (alone, piped)]
    assert metrics[1].keys() == metrics[0].keys() and len(metrics[0]) > 5
    for name, value in metrics[0].items():
        if name.startswith("reconstruction/"):  # not the ranks of nearly equal features
            assert metrics[1][name] == pytest.approx(value, rel=1e-3), name
    for step in (2, STEPS):
        pictures = [Image.open(folder / "pictures" / f"step-{step:06d}.png") for folder in (alone, piped)]
        difference = ImageChops.difference(*(picture.convert("RGB") for picture in pictures))
        assert max(high for _, high in difference.getextrema()) <= 1
