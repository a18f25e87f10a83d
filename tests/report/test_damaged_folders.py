"""Whatever stands in a run's files, the report is made, or one line says why not."""

import json
import os
import random

import pytest
from json_mutations import either, one_line, put
from made_up_run import GENERATION, dit_run, line, tokenizer_run, write

from megavtp.errors import UserError
from megavtp.report import page, render_page

CASES = 40


@pytest.fixture
def quick(monkeypatch):
    """No curves, which take a tenth of a second each."""
    monkeypatch.setattr(page, "draw", lambda panel: "")


def fuzz(path):
    """Mutate a file of a run's folder; return how often the page was made."""
    whole, made = path.read_bytes(), 0
    for seed in range(CASES):
        put(path, either(whole, random.Random(seed)))
        try:
            made += "Make it again" in render_page([path.parent])
        except UserError as error:
            assert one_line(error)
    return made


@pytest.mark.parametrize("number", range(16))
def test_mutated_lines(number, tmp_path, quick):
    """A few mutations of each line; pictures are left away, as they are slow."""
    folder = tokenizer_run(tmp_path / "run")
    for picture in folder.rglob("*.png"):
        picture.unlink()
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    for seed in range(4):
        changed = either(lines[number], random.Random(seed))
        put(path, b"\n".join([*lines[:number], changed, *lines[number + 1 :]]))
        assert "Make it again" in render_page([folder])


def test_mutated_measures(tmp_path, quick):
    folder = dit_run(tmp_path / "run")
    (folder / "samples_guidance.png").unlink()
    assert json.loads((folder / "generation.json").read_text()) == GENERATION
    assert fuzz(folder / "generation.json") == CASES


def test_mutated_configurations(tmp_path, quick):
    """As JSON, which YAML contains."""
    config = {"train": {"steps": 40, "batch_size": 8}, "flow_matching": {"time_mu": 0.5}, "parallel": {"tp": 1}}
    folder = write(tmp_path / "run", config, [line(10, {"a/loss": 1.0})])
    put(folder / "config.yaml", json.dumps(config))
    assert fuzz(folder / "config.yaml") > CASES / 3


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 5e-324, 0.0])
def test_curves_of_extreme_numbers(value, tmp_path):
    records = [line(step, {"a/loss": value * (-1) ** step}, lr=value, seconds_per_step=value) for step in range(1, 13)]
    config = {"train": {"steps": 12}, "flow_matching": {"time_mu": 0}}
    assert "Make it again" in render_page([write(tmp_path / "run", config, records)])


def test_names_that_are_no_text(tmp_path, quick):
    folder = dit_run(tmp_path / "run")
    os.rename(folder / "samples_guidance.png", os.fsencode(folder) + b"/\xff.png")
    assert render_page([folder]).encode(errors="replace")
