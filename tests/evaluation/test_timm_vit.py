"""Distances of the features of a ViT of timm; a small one stands in for the library, which need not be installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm_library import put_timm
from torch import nn

import megavtp
from megavtp.checkpoint.formats.hf_vtp import save_folder
from megavtp.config.schema import DecoderConfig, ModelConfig, VisionConfig
from megavtp.config.sizes import resolve_model
from megavtp.errors import UserError
from megavtp.evaluation.distances.feature_sets import frechet_distance, statistics_of
from megavtp.evaluation.distances.image_sources import open_images
from megavtp.evaluation.distances.measure import load_network
from megavtp.evaluation.distances.network import metric_name
from megavtp.evaluation.distances.npz_file import read_statistics, write_statistics
from megavtp.models.build import build_vtp

sys.path.append(str(Path(__file__).parents[1] / "extraction"))
from picture_shards import write_shards  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
NAME = "vit_tiny_patch14.made_up"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class TinyViT(nn.Module):
    """With what is read of timm's; its output is that in front of a classifier."""

    num_features, pretrained_cfg = 6, {"mean": MEAN, "std": STD}

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 14, 14)
        self.patch_embed.patch_size = (14, 14)
        self.blocks, self.norm = nn.ModuleList(), nn.LayerNorm(6)

    def forward_intermediates(self, x):
        raise AssertionError("the last output is wanted")

    def forward(self, x):
        assert x.shape[2:] == (224, 224) and x.dtype == torch.float32
        return self.norm(self.patch_embed(x).mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    put_timm(monkeypatch, {NAME: TinyViT(), "resnet": nn.Linear(1, 1)})


@pytest.fixture
def weights(tmp_path):
    """As released: with a classifier, which is left out."""
    tensors = TinyViT().state_dict()
    save_file(tensors | {"head.weight": torch.zeros(9, 6)}, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors", tensors


@pytest.mark.parametrize("size", [224, 56, 300])
def test_features_are_the_networks_output(timm, weights, size):
    path, tensors = weights
    network = load_network(None, "cpu", (NAME, str(path)))
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    planes = [Image.fromarray(plane) for plane in images.float().flatten(0, 1).numpy()]
    resized = np.stack([plane.resize((224, 224), Image.BICUBIC) for plane in planes])
    x = torch.from_numpy(resized).unflatten(0, (3, 3)).clamp(0, 255) / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    patches = F.conv2d(x, tensors["patch_embed.weight"], tensors["patch_embed.bias"], stride=14).mean((2, 3))
    want = F.layer_norm(patches, (6,), tensors["norm.weight"], tensors["norm.bias"])
    with torch.autocast("cpu", torch.bfloat16):
        got = network(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.shape == (3, network.dims) and got.dtype == torch.float32
    assert metric_name("frechet", network.name, "generation") == f"generation/fd_{NAME}"
    assert metric_name("frechet", network.name, "reconstruction") == f"reconstruction/fd_{NAME}"


def test_statistics_of_other_weights_are_refused(timm, weights, tmp_path):
    path, tensors = weights
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    one, other = (load_network(None, "cpu", (NAME, str(file))) for file in (path, tmp_path / "other.safetensors"))
    images = torch.randint(0, 256, (9, 3, 28, 28), dtype=torch.uint8)
    write_statistics(tmp_path / "statistics.npz", statistics_of(one(images)), one.made_by)
    assert read_statistics(tmp_path / "statistics.npz", one.made_by, one.dims).count == 9
    with pytest.raises(UserError, match=f"holds statistics of {NAME} .* features"):
        read_statistics(tmp_path / "statistics.npz", other.made_by, other.dims)


def test_both_tools_measure_on_it(timm, weights, tmp_path, monkeypatch):
    tower = {"width": 32, "depth": 1, "heads": 2}
    config = resolve_model(
        ModelConfig(image_size=64, bottleneck=8, vision=VisionConfig(**tower), decoder=DecoderConfig(**tower))
    )
    save_folder(tmp_path / "vtp", config, build_vtp(config, objectives={"reconstruction"}, seed=3).state_dict())
    for split in ("train", "test"):
        write_shards(tmp_path / split, [7])
    network, out = load_network(None, "cpu", (NAME, str(weights[0]))), tmp_path / "metrics.json"
    (_, real), = open_images(tmp_path / "test", 64).batches(7, 0, 1)
    statistics = statistics_of(network(real))
    tokenizer = megavtp.load_tokenizer(tmp_path / "vtp")
    shown = tokenizer.decode(tokenizer.encode(real)).mul(255).round().to(torch.uint8)
    for words, name, images in (
        (["--checkpoint", tmp_path / "vtp", "--data", tmp_path], f"reconstruction/fd_{NAME}", shown),
        (["generation", "--samples-from", tmp_path / "test", "--reference", tmp_path / "test", "--size", 64],
         f"generation/fd_{NAME}", real),
    ):  # fmt: skip
        words = [TOOL, *words, "--timm", NAME, weights[0], "--out", out, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as stopped:
            run_path(str(TOOL), run_name="__main__")
        assert stopped.value.code == 0
        want = frechet_distance(statistics_of(network(images)), statistics)
        assert json.loads(out.read_text())["metrics"][name] == pytest.approx(want, rel=1e-3, abs=1e-9)
    assert want < 1e-6 < frechet_distance(statistics_of(network(shown)), statistics)


def test_mistakes_are_named(timm, weights, tmp_path, monkeypatch):
    path, _ = weights
    save_file({"layer1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    (tmp_path / "text.pth").write_bytes(b"text")
    for name, file, said in (
        (NAME, tmp_path / "resnet.safetensors", r"resnet.safetensors \(vit_tiny.* missing patch_embed.weight"),
        (NAME, tmp_path / "none.safetensors", f"do not exist; --timm {NAME}: give the file of its weights"),
        (NAME, tmp_path / "text.pth", "text.pth.*give the file of its weights"),
        ("vit_tiny_patch14.made_down", path, f"no such model; did you mean {NAME}"),
        ("resnet", path, "--timm resnet is no ViT"),
    ):
        with pytest.raises(UserError, match=said):
            load_network(None, "cpu", (name, str(file)))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=f"--timm {NAME} needs the timm library"):
        load_network(None, "cpu", (NAME, str(path)))
