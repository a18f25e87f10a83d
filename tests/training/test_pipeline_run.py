"""A run over pipeline ranks from the launcher to the last picture: it says and leaves what one process does."""

import json

import pytest
from launched import events, steps_done, succeed
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
    # Evaluated after other steps: that must leave no trace in the training.
    alone = start(recipe, tmp_path / "alone", 1, "parallel.zero_stage=0", "evaluation.every=1")
    layout = ["parallel.pp=2", "parallel.zero_stage=3", "parallel.schedule=gpipe"]
    piped = start(recipe, tmp_path / "piped", 2, *layout, "evaluation.every=2")
    expected, got = steps_done(alone), steps_done(piped)
    assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert got[step]["terms"] == pytest.approx(values["terms"], rel=1e-5, abs=1e-5)
        assert got[step]["tower_grad_norms"] == pytest.approx(values["tower_grad_norms"], rel=1e-4)
    expected, got = ({event["step"]: event for event in events(folder, "evaluation")} for folder in (alone, piped))
    assert list(expected) == [1, 2, STEPS] and list(got) == [2, STEPS]
    for step, metrics in got.items():
        assert metrics.keys() == expected[step].keys() and len(metrics) > 8
        for name, value in expected[step].items():
            if name.startswith("reconstruction/"):  # not the ranks of nearly equal features
                assert metrics[name] == pytest.approx(value, rel=1e-3), (step, name)
    last = json.loads((piped / "evaluation.json").read_text())
    assert last["step"] == STEPS and last.items() <= got[STEPS].items()
    for step in (2, STEPS):
        pictures = [Image.open(folder / "pictures" / f"step-{step:06d}.png") for folder in (alone, piped)]
        difference = ImageChops.difference(*(picture.convert("RGB") for picture in pictures))
        assert max(high for _, high in difference.getextrema()) <= 1
