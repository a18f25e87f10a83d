"""Pictures: the right pixels in the right place, and curves that tolerate what a run leaves behind."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from megavtp.training import pictures


def test_every_input_stands_above_its_reconstruction(tmp_path):
    inputs = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 128, 128) * 20
    path = tmp_path / "new" / "grid.png"
    pictures.reconstruction_grid(inputs, inputs + 5, path)
    with Image.open(path) as image:
        sheet = np.asarray(image)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    left = sheet.shape[1] - 8 * 132  # width of the labels' margin
    for index in range(10):
        x, y = left + (index % 8) * 132 + 64, 4 + (index // 8) * (260 + 16) + 64
        assert sheet[y, x].tolist() == [20 * index] * 3
        assert sheet[y + 132, x].tolist() == [20 * index + 5] * 3
    assert (sheet[:, :left] < 128).any()  # labels


def test_small_pictures_are_enlarged_by_a_whole_factor(tmp_path):
    inputs = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    pictures.reconstruction_grid(inputs, inputs, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        sheet = np.asarray(image)
    left = sheet.shape[1] - 2 * 124
    assert np.array_equal(sheet[4 : 124 : 3, left : left + 120 : 3], inputs[0].permute(1, 2, 0).numpy())


def metrics(path, count=200):
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        file.write('{"kind": "checkpoint", "step": 3}\n')
        for step in range(10, 10 * count + 1, 10):
            terms = {"reconstruction/l1": 0.2 + 1 / step, "contrastive/loss": 5 * np.exp(-step / 500) + rng.normal()}
            terms |= {"self_distillation/ibot": None if step == 50 else 7.0, "extra": 1.0}
            file.write(json.dumps({"kind": "step", "step": step, "terms": terms}) + "\n")
        file.write('{"kind": "step", "st')  # torn by a crash


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_curves_are_drawn(tmp_path):
    metrics(tmp_path / "metrics.jsonl")
    curves = pictures._curves(tmp_path / "metrics.jsonl")
    assert list(curves) == ["contrastive/loss", "self_distillation/ibot", "reconstruction/l1", "extra"]
    assert [len(values) for _, values in curves.values()] == [200, 199, 200, 200]
    assert pictures.loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_nothing_to_draw_is_no_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "metrics.jsonl").write_text("")
    assert not pictures.loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not pictures.loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert "matplotlib is not installed" in caplog.text and not (tmp_path / "curves.png").exists()


def test_smoothing_is_the_mean_of_the_neighbours():
    values = np.arange(100.0) ** 2
    smooth = pictures.smoothed(values)  # 5 points
    assert smooth[50] == pytest.approx(np.mean(values[48:53])) and smooth[0] == pytest.approx(np.mean(values[:3]))
    assert pictures.smoothed([3.0]).tolist() == [3.0]
