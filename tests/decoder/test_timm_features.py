"""What a discriminator reads of a ViT of timm; a small one stands in for the library, which need not be installed."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm_library import put_timm
from torch import nn

from megavtp.config.schema import AdversarialConfig
from megavtp.errors import UserError
from megavtp.models.feature_networks import timm_features

NAME = "vit_tiny_patch8.made_up"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
WIDTH, DEPTH = 6, 5


class TinyViT(nn.Module):
    """With what is read of timm's: blocks, the tokens of some of them without the class token, and the last norm."""

    embed_dim = WIDTH
    pretrained_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 32, 32)}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward_intermediates(self, x, indices, output_fmt, intermediates_only):
        assert (output_fmt, intermediates_only) == ("NLC", True)
        x, found = self.patch_embed(x).flatten(2).transpose(1, 2), []
        for number, block in enumerate(self.blocks):
            x = x + torch.tanh(block(x))
            found += [x] if number in indices else []
        return found


@pytest.fixture
def timm(monkeypatch):
    put_timm(monkeypatch, {NAME: TinyViT(), "resnet": nn.Linear(1, 1)})


@pytest.fixture
def weights(tmp_path):
    """As released: with a classifier, which is left out; other numbers than a new network's."""
    tensors = {name: tensor + 0.1 for name, tensor in TinyViT().state_dict().items()}
    save_file(tensors | {"head.weight": torch.zeros(9, WIDTH)}, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors", tensors


def settings(name=NAME, file=None, size=None) -> AdversarialConfig:
    return AdversarialConfig(1.0, features=f"timm:{name}", features_weights=file and str(file), features_size=size)


@pytest.mark.parametrize("size", [None, 16])
def test_it_reads_the_quarters_and_the_last_norm(timm, weights, size):
    """Equal to the network written out, with its gradient by the pictures; nothing of it is trained."""
    path, w = weights
    network = timm_features(settings(file=path, size=size), torch.float32)
    assert network.widths == [WIDTH] * 5 and not any(p.requires_grad for p in network.parameters())
    pictures = (2 * torch.rand(2, 3, 32, 32) - 1).requires_grad_()
    x = pictures if size is None else F.interpolate(pictures, (size, size), mode="bicubic", antialias=True)
    x = (x / 2 + 0.5 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    x = F.conv2d(x, w["patch_embed.weight"], w["patch_embed.bias"], stride=8).flatten(2).transpose(1, 2)
    tokens = []
    for number in range(DEPTH):
        x = x + torch.tanh(F.linear(x, w[f"blocks.{number}.weight"], w[f"blocks.{number}.bias"]))
        tokens.append(x)
    want = [*(tokens[number] for number in (1, 2, 3, 4)), F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"])]
    got = network(pictures)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    slope, expected = (torch.autograd.grad(sum(t.square().sum() for t in all), pictures)[0] for all in (got, want))
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)


def test_mistakes_are_named(timm, weights, tmp_path, monkeypatch):
    path, _ = weights
    save_file({"layer1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    (tmp_path / "text.pth").write_bytes(b"text")
    asked = "objectives.adversarial.features = timm:"
    for given, said in (
        (settings(), f"{asked}{NAME} needs the file of its weights: objectives.adversarial.features_weights"),
        (settings(file=tmp_path / "resnet.safetensors"), r"resnet.safetensors \(vit_tiny.* missing patch_embed.weight"),
        (settings(file=tmp_path / "text.pth"), "text.pth.*features_weights takes the weights of the timm ViT"),
        (settings("vit_tiny_patch8.made_down", path), f"{asked}.*no such model; did you mean {NAME}"),
        (settings("resnet", path), f"{asked}resnet is no ViT: name one"),
    ):
        with pytest.raises(UserError, match=said):
            timm_features(given, torch.float32)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=f"{asked}{NAME} needs the timm library"):
        timm_features(settings(file=path), torch.float32)
