"""The pictures of a run's folder, as data that stand in the page itself."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megavtp.report.folder import Run

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_WIDEST = 1600  # pixels; wider pictures are reduced
_TALLEST = 3200
_SMALL = 512  # pixels of a side of a picture that is one of dozens
_MOST_PIXELS = 64_000_000
_LARGE = 300_000  # bytes of a PNG above which a JPEG takes its place, if that is smaller
_STEPS = 4  # pictures made while a run trains that are shown of it
_OTHERS = 12  # further pictures of a run that are shown
_DRAWN_ANEW = "loss_curves.png"
_CAPTIONS = {
    "reconstructions": "Held-out pictures above their reconstructions",
    "samples": "Pictures drawn",
    "samples_guidance": "Pictures drawn with guidance",
}


@dataclass(frozen=True)
class Picture:
    """``data`` is a data URL; width and height are in pixels."""

    caption: str
    file: str
    data: str
    width: int
    height: int


def read_pictures(run: Run) -> list[Picture]:
    """Return a few pictures made while the run trained, evenly over its steps with the last, and those beside them.

    A file that is no picture, or too large, is named in ``run.left_out``.
    """
    names = {Path(str(event.get("path"))).name: event for event in run.events_of("picture")}
    trained = _evenly(_files(run.path / "pictures"), _STEPS)
    shown = [(path, _while_training(path, names.get(path.name))) for path in trained]
    others = [path for path in _files(run.path) if path.name != _DRAWN_ANEW]
    shown += [(path, _CAPTIONS.get(path.stem, path.stem.replace("_", " "))) for path in others[:_OTHERS]]
    if len(others) > _OTHERS:
        run.left_out.append(f"{run.path} has {len(others)} pictures, of which the first {_OTHERS} are shown")
    pictures = [read_picture(path, caption, run.path, run.left_out) for path, caption in shown]
    return [picture for picture in pictures if picture is not None]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())


def _evenly(paths: Sequence[Path], count: int) -> list[Path]:
    """Return at most ``count`` of the paths, the first and the last among them."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(index * (len(paths) - 1) / (count - 1))] for index in range(count)]


def _while_training(path: Path, event: object) -> str:
    if isinstance(event, dict):
        return f"Step {event['step']:,}: {event.get('name')}"
    return path.stem.replace("-", " ").capitalize()


def read_picture(path: Path, caption: str, root: Path, left_out: list[str], small: bool = False) -> Picture | None:
    """Decode a picture below ``root`` and encode it again, so that nothing but pixels comes into the page; ``small`` is
    for one of dozens, which together are to be a page that can be mailed.

    Return None for a file that is no picture, or too large; a line in ``left_out`` names it then.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                left_out.append(f"{path} is left out: it has {image.width} x {image.height} pixels")
                return None
            pixels = image.convert("RGB")
    except Exception as error:  # PIL raises many kinds for damaged files
        left_out.append(f"{path} is left out: it is no whole picture ({type(error).__name__})")
        return None
    pixels.thumbnail((_SMALL, _SMALL) if small else (_WIDEST, _TALLEST), Image.Resampling.LANCZOS)
    file = str(path.relative_to(root))
    return Picture(caption, file, _encoded(pixels, small), *pixels.size)


def _encoded(pixels: Image.Image, small: bool) -> str:
    """Return a data URL: JPEG if it is to be small or the PNG would be large and the JPEG smaller, else PNG."""
    kinds = {} if small else {"png": _bytes(pixels, "PNG", optimize=True)}
    if small or len(kinds["png"]) > _LARGE:
        kinds["jpeg"] = _bytes(pixels, "JPEG", quality=75 if small else 90, optimize=True)
    kind = min(kinds, key=lambda kind: len(kinds[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(kinds[kind]).decode()}"


def _bytes(pixels: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    pixels.save(file, format=form, **options)
    return file.getvalue()
