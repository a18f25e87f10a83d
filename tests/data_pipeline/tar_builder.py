"""Small tars and images for the tests of the data pipeline."""

import io
import tarfile

import numpy as np
from PIL import Image


def picture(width=12, height=8, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth(width=64, height=48):
    """A gradient, which JPEG keeps nearly unchanged."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 3, y * 4, x + y], -1).astype(np.uint8))


def write_tar(path, members):
    """``members``: (name, bytes), or a ready TarInfo (links, devices) in place of the name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, caption="a cat", image=None, meta=None):
    members = [(f"{key}.png", image or encode(picture()))]
    if caption is not None:
        members.append((f"{key}.txt", caption.encode()))
    if meta is not None:
        members.append((f"{key}.json", meta))
    return members
