import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from megavtp.data.augment import center_crop
from megavtp.errors import UserError
from megavtp.evaluation.distances.image_sources import open_images
from megavtp.evaluation.distances.npz_images import NpzImages, holds_images

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / "images" / ("more" if i > 7 else "") / f"{i:06d}.png")
    (tmp_path / "images" / "readme.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture(params=["stored", "compressed"])
def npz(tmp_path, request):
    (np.savez if request.param == "stored" else np.savez_compressed)(tmp_path / "x.npz", PIXELS, np.arange(11))
    return tmp_path / "x.npz"


def everything(source, batch_size=4, world=1):
    """All ranks' images in the order of their numbers, each at most once."""
    found = {}
    for rank in range(world):
        for numbers, images in source.batches(batch_size, rank, world):
            assert images.dtype == torch.uint8 and len(numbers) == len(images) <= batch_size
            for number, image in zip(numbers.tolist(), images):
                assert number not in found
                found[number] = image
    return torch.stack([found[number] for number in sorted(found)])


def chw(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_folder_and_npz_hold_the_same(folder, npz, world):
    for path in (folder, npz):
        source = open_images(path)
        assert len(source) == 11 and source.size == 8
        assert torch.equal(everything(source, world=world), chw(PIXELS))


def test_a_limit_spreads(folder, npz):
    for path in (folder, npz):
        source = open_images(path, limit=4)
        assert len(source) == 4
        assert torch.equal(everything(source, 3, 2), chw(PIXELS[[0, 2, 5, 8]]))
        assert len(open_images(path, limit=99)) == 11


def test_images_are_cropped_to_the_size_that_is_asked_for(folder, npz):
    wide = torch.randint(0, 256, (3, 10, 30), dtype=torch.uint8)
    Image.fromarray(wide.permute(1, 2, 0).numpy()).save(folder / "000000.png")
    want = [center_crop(wide, 6), *(center_crop(image, 6) for image in chw(PIXELS[1:]))]
    assert torch.equal(everything(open_images(folder, 6)), torch.stack(want))
    with pytest.raises(UserError, match="--size"):
        everything(open_images(folder))
    assert torch.equal(everything(open_images(npz, 6))[1:], torch.stack(want[1:]))


def test_a_broken_image_is_left_out_and_named(folder, caplog):
    (folder / "000000.png").write_bytes(b"nothing")
    assert torch.equal(everything(open_images(folder)), chw(PIXELS[1:]))
    assert "000000.png" in caplog.text


def test_what_cannot_be_read(tmp_path, folder):
    cases = {"absent": "does not exist", "images/readme.txt": "neither a folder nor", "empty": "holds neither images"}
    (tmp_path / "empty").mkdir()
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_images(tmp_path / name)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no image that can be read"):
        open_images(folder)
    with pytest.raises(UserError, match="pipes and URLs"):
        open_images("https://example.org/x.npz")


class Hostile:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": np.array([Hostile()] * 2, object)}, "Python objects, which are refused"),
    ({"arr_0": PIXELS.astype(np.float32)}, "float32"),
    ({"arr_0": PIXELS[..., 0]}, r"uint8 of shape \(11, 8, 8\)"),
    ({"arr_0": PIXELS[:0]}, "shape"),
    ({"arr_0": np.asfortranarray(PIXELS)}, "shape"),
    ({"mu": np.zeros(3)}, "holds no images"),
])  # fmt: skip
def test_other_arrays_are_refused(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "x.npz")
    assert "must not run" not in capsys.readouterr().out


def test_damaged_archives_are_refused(tmp_path, npz):
    whole = npz.read_bytes()
    for content in (b"", b"\x80\x04K\x01.", whole[: len(whole) // 2]):
        npz.write_bytes(content)
        with pytest.raises(UserError, match="no whole .npz"):
            open_images(npz)
        with pytest.raises(UserError, match="no whole .npz"):
            holds_images(npz)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (11, 8, 8, 3)})
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + PIXELS.tobytes()[:-1])
    with pytest.raises(UserError, match="damaged .it ends before its last image"):
        everything(open_images(npz))
    changed = bytearray(whole)
    changed[400] ^= 255
    npz.write_bytes(changed)
    with pytest.raises(UserError, match="damaged"):
        everything(open_images(npz))


def test_rows_are_read_one_by_one(npz, monkeypatch):
    """Not the array as a whole: it may be larger than the memory."""
    monkeypatch.setattr(np, "load", None)
    assert len(next(NpzImages(npz).batches(2, 0, 1))[1]) == 2
