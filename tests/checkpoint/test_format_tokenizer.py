"""``megavtp.load_tokenizer``: ranges, statistics, text, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from vtp_oracle import DATA

import megavtp
from megavtp.checkpoint.formats.hf_vtp import load_folder, save_folder
from megavtp.conversion import convert
from megavtp.errors import UserError
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact
from megavtp.pixels import normalise, to_uint8


@pytest.fixture(scope="module")
def tokenizer():
    return megavtp.load_tokenizer(DATA / "default")


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_images_in_both_ranges_and_back(tokenizer, images):
    latents = tokenizer.encode(images)
    assert latents.shape == (3, 16, 4, 3) and latents.dtype == torch.float32 and not latents.requires_grad
    assert torch.allclose(tokenizer.encode(images / 255), latents, atol=1e-4)
    with torch.no_grad():
        plain = tokenizer.model("reconstruction", images=normalise(images))
    decoded = tokenizer.decode(latents)
    assert decoded.shape == images.shape and 0 <= decoded.min() and decoded.max() <= 1
    assert torch.equal(decoded.mul(255).round().to(torch.uint8), to_uint8(plain))


def test_normalised_latents(tokenizer, images, tmp_path):
    latents = tokenizer.encode(images)
    flat = latents.transpose(0, 1).flatten(1).double()
    statistics = LatentStatistics(tuple(flat.mean(1).tolist()), tuple(flat.std(1).tolist()), images=3)
    replace(tokenizer.artifact, statistics=statistics).write(tmp_path)
    own = megavtp.load_tokenizer(DATA / "default", latents=tmp_path)
    normal = own.encode(images, normalised=True)
    expected = (latents - flat.mean(1).float()[:, None, None]) / flat.std(1).float()[:, None, None]
    assert torch.allclose(normal, expected, atol=1e-5)
    assert torch.allclose(own.decode(normal, normalised=True), own.decode(latents), atol=1e-3)
    assert torch.equal(own.encode(images), latents)
    with pytest.raises(UserError, match="no latent statistics"):
        tokenizer.encode(images, normalised=True)
    other = replace(statistics, mean=(0.0,) * 16)
    with pytest.raises(UserError, match="different latent statistics"):
        own.take_statistics(replace(own.artifact, statistics=other), "elsewhere")
    with pytest.raises(UserError, match="different tokenizers"):
        own.take_statistics(replace(own.artifact, fingerprint="0" * 64), "elsewhere")


def test_features_and_half_precision(tokenizer, images):
    ids = torch.zeros(2, 16, dtype=torch.long)
    ids[:, 3] = 511
    for features in (tokenizer.encode_image(images), tokenizer.encode_text(ids)):
        assert torch.allclose(features.norm(dim=-1), torch.ones(len(features)), atol=1e-5)
    half = megavtp.load_tokenizer(DATA / "default", dtype=torch.bfloat16).encode(images)
    exact = tokenizer.encode(images)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_a_checkpoint_without_some_towers(tmp_path, images):
    folder = tmp_path / "hf"
    folder.mkdir()
    config, tensors = load_folder(DATA / "default")
    kept = {n: t for n, t in tensors.items() if n.startswith(("trunk.", "pixel_decoder."))}
    save_folder(folder, config, kept)
    convert(folder, "native", tmp_path / "native")
    for path in (folder, tmp_path / "native"):
        own = megavtp.load_tokenizer(path)
        assert own.decode(own.encode(images)).shape == images.shape and own.artifact.captions is None
        with pytest.raises(UserError, match="no text encoder"):
            own.encode_text(["a dog"])


@pytest.mark.parametrize("call, message", [
    (lambda t, x: t.encode(x.float()), "lie in 0..255"),
    (lambda t, x: t.encode(x.int()), "uint8 in 0..255"),
    (lambda t, x: t.encode(x[:, :, :50]), "patches of 16"),
    (lambda t, x: t.encode(x[0]), "expected"),
    (lambda t, x: t.decode(torch.zeros(1, 8, 4, 4)), "expected"),
    (lambda t, x: t.encode_text(torch.full((1, 16), 512)), "0 to 511"),
    (lambda t, x: t.encode_text(["a dog"]), "49408 ids"),
])
def test_wrong_use(tokenizer, images, call, message):
    with pytest.raises(UserError, match=message):
        call(tokenizer, images)


def test_wrong_places(tmp_path):
    for arguments, message in (
        ({"path": tmp_path}, "is no tokenizer"), ({"path": DATA / "default", "device": "cuda:99"}, "no such device"),
        ({"path": DATA / "default", "dtype": torch.int8}, "dtype"),
        ({"path": DATA / "default", "latents": tmp_path}, "visual_tokenizer.json is missing"),
    ):
        with pytest.raises(UserError, match=message):
            megavtp.load_tokenizer(**arguments)


@pytest.mark.parametrize("change", [
    {"version": 2}, {"fingerprint": 3}, {"image_size": 0}, {"statistics": {"mean": [1], "std": [0]}},
    {"statistics": {"mean": [1]}}, {"pixel_mean": None}, {"more": 1},
])
def test_damaged_artifacts(change):
    values = {**TokenizerArtifact("f" * 64, 64, 16, 8).to_dict(), **change}
    with pytest.raises(UserError):
        TokenizerArtifact.from_dict(values, "here")
