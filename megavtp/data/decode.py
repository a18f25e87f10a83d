"""Decoding: image bytes, whatever they hold, become an RGB uint8 tensor or a ``BadSample``."""

import io
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # optional: 1.3 to 3 times Pillow's speed on JPEG, same pixels within rounding
    simplejpeg = None

MAX_PIXELS = 64_000_000  # of an image, unless the user sets another limit
# Only these are ever tried: some other decoders of Pillow start programs (EPS), and no training data need the rest.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class BadSample(Exception):
    """One sample that cannot be used; the message is the reason. Loaders skip it, count it and name it."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode to (3, H, W) uint8 RGB, upright by its EXIF orientation, transparency over white.

    The strides are those of an interleaved image (channels last), which saves a copy. ``BadSample`` for bytes that are
    no whole image, or that announce more than ``max_pixels`` pixels, which is checked before anything is decoded.
    """
    try:
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is None:
            pixels = np.array(to_rgb(open_image(data, max_pixels)))
    except BadSample:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes: OSError, SyntaxError, struct.error
        raise BadSample(f"cannot decode image: {type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Read only the header with Pillow, check the size, and return the not yet decoded image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is checked here; odd metadata is no reason for a line per sample
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise BadSample(f"image too large: {error}") from error
        except UnidentifiedImageError:  # its message holds a memory address: no two would be alike
            raise BadSample(f"cannot decode image: not of a known format ({', '.join(FORMATS)})") from None
    if not all(image.size):
        raise BadSample(f"empty image: {image.width} x {image.height} pixels")
    if image.width * image.height > max_pixels:
        raise BadSample(
            f"image too large: {image.width} x {image.height} pixels, the limit is {max_pixels} (data.max_pixels)"
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to upright RGB, with transparency over white and 16-bit gray as its upper 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            # Pillow clips these at 255 when it converts; files hold 16 bits, except float ones, which hold 0 to 1.
            values = np.asarray(image, dtype=np.float64) * (255.0 if image.mode == "F" else 255.0 / 65535.0)
            image = Image.fromarray(np.nan_to_num(values).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Decode the common cases fast. ``None`` leaves CMYK colours, rotated pictures and all faults to Pillow, which
    forgives some, so that the same pictures are good with and without the optional decoder."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        # Pillow has a limit of its own, which is higher than this module's.
        if colours not in ("YCbCr", "RGB", "Gray") or height * width > min(max_pixels, MAX_PIXELS):
            return None
        # Pillow, which knows EXIF and XMP data, takes ten times as long for the header.
        if _may_tell_orientation(data):
            if open_image(data, max_pixels).getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # its default, strict mode also raises for faults that can be repaired
        return None


def _may_tell_orientation(data: bytes) -> bool:
    """Whether a JPEG header has an APP1 segment, in which EXIF and XMP data lie, or is laid out in an unusual way."""
    at = 2
    while (marker := data[at : at + 2]) != b"\xff\xda":  # start of scan, where the header ends
        if marker[:1] != b"\xff" or marker[1:] in (b"\xe1", b"\xff"):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False
