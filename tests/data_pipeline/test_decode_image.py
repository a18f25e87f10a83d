import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tar_builder import encode, picture, smooth

from megavtp.data import decode
from megavtp.data.decode import BadSample, decode_image


def pixels(data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = decode_image(data, **options)
    assert out.dtype == torch.uint8 and out.shape[0] == 3
    return out.permute(1, 2, 0).numpy()


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    elif decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_are_exact(format):
    image = picture(13, 7)
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encode(image, format, **options)), np.asarray(image))


def test_jpeg(decoder):
    image = smooth()
    got = pixels(encode(image, "JPEG", quality=95))
    assert got.shape == (48, 64, 3) and np.abs(got.astype(int) - np.asarray(image)).max() < 12


def test_gray_and_cmyk_jpeg(decoder):
    gray = smooth().convert("L")
    got = pixels(encode(gray, "JPEG", quality=95))
    assert np.abs(got.astype(int) - np.asarray(gray)[..., None]).max() < 6
    cmyk = smooth().convert("CMYK")
    got = pixels(encode(cmyk, "JPEG", quality=95))
    assert np.abs(got.astype(int) - np.asarray(smooth())).max() < 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(decoder, orientation):
    """Each of the eight ways a camera stores the picture comes out as the upright one."""
    upright = np.asarray(smooth())
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    got = pixels(encode(stored, "JPEG", quality=97, exif=exif, subsampling=0))
    assert got.shape == upright.shape and np.abs(got.astype(int) - upright).max() < 12


def test_transparency_is_over_white():
    color, alpha = np.full((4, 6, 3), (200, 100, 0), np.uint8), np.array([0, 64, 128, 192, 255, 255], np.uint8)
    rgba = np.concatenate([color, np.broadcast_to(alpha[None, :, None], (4, 6, 1))], -1)
    expected = (color * (alpha / 255)[None, :, None] + 255 * (1 - alpha / 255)[None, :, None]).round()
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert np.abs(pixels(encode(Image.fromarray(rgba), format, **options)) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert pixels(encode(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert pixels(encode(palette, "PNG")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    gray = Image.fromarray(np.array([[10, 20]], np.uint8))
    assert pixels(encode(gray, "PNG", transparency=10)).tolist() == [[[255] * 3, [20] * 3]]
    assert pixels(encode(Image.merge("LA", [gray, gray.point(lambda _: 0)]), "PNG")).min() == 255


def test_sixteen_bit_float_and_one_bit():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]
    assert np.array_equal(pixels(encode(Image.fromarray(ramp), "PNG"))[0, :, 0], np.arange(256))
    single = Image.fromarray(np.array([[0.0, 0.5, 1.0, 7.0, np.nan]], np.float32))
    assert pixels(encode(single, "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 255, 0]
    assert pixels(encode(Image.fromarray(np.eye(3) > 0), "PNG"))[..., 1].tolist() == (np.eye(3) * 255).tolist()


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_header(decoder):
    for width, height in ((20_000, 10_000), (100_000, 100_000)):
        with pytest.raises(BadSample, match="too large"):
            pixels(png_header(width, height))
    jpeg = bytearray(encode(smooth(), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadSample, match="too large"):
        pixels(bytes(jpeg))
    assert pixels(encode(picture(10, 10)), max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(BadSample, match="10 x 11 pixels, the limit is 100"):
        pixels(encode(picture(10, 11)), max_pixels=100)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_any_cut_is_a_bad_sample(decoder, format):
    data = encode(picture(40, 40), format)
    for cut in range(0, len(data) - 20, max(1, len(data) // 23)):
        with pytest.raises(BadSample):
            pixels(data[:cut])


def test_random_damage_never_escapes(decoder):
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encode(picture(24, 24), format)
        for _ in range(25):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 6):
                broken[at] = rng.integers(256)
            try:
                decode_image(bytes(broken), 1_000_000)
            except BadSample:
                pass


def test_other_contents_are_no_image():
    for data in (b"", b"\xff\xd8\xff", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"words"):
        with pytest.raises(BadSample, match="cannot decode image"):
            decode_image(data)


def variants():
    """JPEGs of all the ways that a decoder may treat on its own."""
    image, turned = smooth(), Image.Exif()
    turned[0x0112] = 6
    ways = {
        "plain": {}, "progressive": {"progressive": True}, "subsampled": {"subsampling": 2},
        "restarts": {"restart_marker_blocks": 2}, "turned": {"exif": turned},
        "turned by XMP": {"xmp": b'<x:xmpmeta tiff:Orientation="6"/>'}, "RGB": {"keep_rgb": True},
        # The EXIF data lie behind another block, beyond the first 64 KiB.
        "late EXIF": {"exif": turned, "icc_profile": bytes(70_000)},
    }
    found = {way: encode(image, "JPEG", **options) for way, options in ways.items()}
    found |= {mode: encode(image.convert(mode), "JPEG") for mode in ("L", "CMYK")}
    found["EXIF after a fill byte"] = found["turned"].replace(b"\xff\xe1", b"\xff\xff\xe1", 1)
    found["two pictures"] = encode(image, "MPO", save_all=True, append_images=[image.rotate(90)])
    return found


def outcome(data):
    try:
        return decode_image(data, 1_000_000).numpy()
    except BadSample:
        return None


def extraneous(data):
    """Five bytes before the last marker: libjpeg warns, and decodes the whole picture."""
    return data[:-2] + b"words" + data[-2:]


def test_a_recoverable_fault_is_read(decoder):
    data = encode(smooth(), "JPEG", restart_marker_blocks=2)
    for at in (data.index(b"\xff\xdb"), data.index(b"\xff\xd0"), len(data) - 2):
        assert np.array_equal(pixels(data[:at] + b"words" + data[at:]), pixels(data)), at


def test_the_same_samples_are_good_without_the_optional_decoder(monkeypatch):
    if decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    rng = np.random.default_rng(0)
    files = {}
    for way, data in variants().items():
        files[way] = data
        files[f"{way}, extraneous bytes"] = extraneous(data)
        for number in range(12):
            at, broken = int(rng.integers(len(data))), bytearray(data)
            broken[at : at + number % 3] = rng.bytes(int(rng.integers(4)))  # changed, put in, or left out
            files[f"{way}, damaged at {at}"] = bytes(broken)
        files[f"{way}, cut"] = data[: int(rng.integers(len(data)))]
    fast = {way: outcome(data) for way, data in files.items()}
    monkeypatch.setattr(decode, "simplejpeg", None)
    for way, data in files.items():
        slow = outcome(data)
        assert (slow is None) == (fast[way] is None), way
        assert slow is None or (slow.shape == fast[way].shape and np.abs(slow.astype(int) - fast[way]).max() <= 4), way
    assert sum(found is not None for found in fast.values()) > 40


def test_both_decoders_agree(monkeypatch):
    if decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    data = encode(smooth(), "JPEG", quality=90)
    fast = pixels(data).astype(int)
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.abs(fast - pixels(data)).max() <= 4
    assert np.abs(fast - np.asarray(Image.open(io.BytesIO(data)))).mean() < 0.6
