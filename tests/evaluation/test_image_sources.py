import io
import random
import tracemalloc
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from megavtp.data.augment import center_crop
from megavtp.errors import UserError
from megavtp.evaluation.distances.image_sources import open_images
from megavtp.evaluation.distances.npz_file import holds_images, read_statistics

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
    with pytest.raises(UserError, match="claims 11 images, more than it holds"):
        open_images(npz)
    changed = bytearray(whole)
    changed[400] ^= 255
    npz.write_bytes(changed)
    with pytest.raises(UserError, match="damaged"):
        everything(open_images(npz))


def claiming(path, **changed):
    """An archive of a few hundred bytes whose array says that it is larger."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2 * 10**8, 8, 8, 3), **changed}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(192))


def test_claims_are_held_against_the_file(tmp_path):
    path = tmp_path / "x.npz"
    claiming(path)
    with pytest.raises(UserError, match="claims 200000000 images, more than it holds"):
        open_images(path)
    content = bytearray(path.read_bytes())
    size = 192 + 128
    for place in (i for i in range(len(content) - 4) if content[i : i + 4] == size.to_bytes(4, "little")):
        content[place : place + 4] = (2**32 - 2).to_bytes(4, "little")  # so the archive's own directory lies as well
    path.write_bytes(content)
    with pytest.raises(UserError, match="claims 200000000 images|no whole .npz"):
        open_images(path)


def test_a_share_of_many_images_is_not_written_down(tmp_path):
    """1 x 1 pixels: numbers of images as a list would take more than the images."""
    np.savez(tmp_path / "x.npz", np.zeros((3 * 10**6, 1, 1, 3), np.uint8))
    images = open_images(tmp_path / "x.npz")
    tracemalloc.start()
    assert len(next(images.batches(4, 0, 1))[1]) == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.parametrize("field, value, message", [
    ("flags", 1, "is encrypted"), ("method", 99, "compression method is not supported"), ("method", 9, "not supported"),
])
def test_archives_that_are_encrypted_or_packed_otherwise(tmp_path, field, value, message):
    np.savez(tmp_path / "images.npz", PIXELS)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    for name, read in (("images", open_images), ("statistics", lambda path: read_statistics(path, "inception", 2))):
        content = bytearray((tmp_path / f"{name}.npz").read_bytes())
        for start, offsets in ((b"PK\3\4", {"flags": 6, "method": 8}), (b"PK\1\2", {"flags": 8, "method": 10})):
            content[content.index(start) + offsets[field]] = value
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(UserError, match=f"no whole .npz file .*{message}"):
            read(tmp_path / f"{name}.npz")


def test_bits_that_flip_in_an_archive(npz):
    """What comes back are the images, or a refusal."""
    whole, draw = npz.read_bytes(), random.Random(3)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 4))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        npz.write_bytes(content)
        with suppress(UserError):
            if holds_images(npz):
                assert torch.equal(everything(open_images(npz)), chw(PIXELS))


def test_rows_are_read_one_by_one(npz, monkeypatch):
    """Not the array as a whole: it may be larger than the memory."""
    monkeypatch.setattr(np, "load", None)
    assert len(next(open_images(npz).batches(2, 0, 1))[1]) == 2
