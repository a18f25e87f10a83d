"""Pictures of a run: inputs above their reconstructions, and loss curves from metrics.jsonl."""

import importlib.util
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.data.files import write_atomic
from megavtp.training.metrics_file import read_metrics
from megavtp.training.output_dir import writing

COLUMNS = 8  # images side by side on a sheet, at most
_GAP = 4  # pixels between pictures
_BAND_GAP = 16  # pixels between bands of rows
_SMALLEST_SIDE = 96  # pixels; smaller pictures are enlarged by a whole factor
_SMOOTHING = 25  # lines of metrics.jsonl in the running mean, at most
# Titles of the terms in a chart; other terms come after these, under their own names.
TITLES = {
    "contrastive/loss": "contrastive",
    "self_distillation/dino_global": "DINO, global views",
    "self_distillation/dino_local": "DINO, local views",
    "self_distillation/ibot": "iBOT, masked patches",
    "self_distillation/koleo": "KoLeo",
    "reconstruction/l1": "reconstruction, L1",
    "reconstruction/perceptual": "reconstruction, LPIPS",
    "self_distillation/teacher_entropy": "teacher's mean assignment, entropy (1 is uniform)",
    "self_distillation/teacher_student_kl": "teacher to student, KL in nats",
    "self_distillation/feature_rank": "class tokens, effective rank",
}

log = logging.getLogger(__name__)


def reconstruction_grid(inputs: Tensor, reconstructions: Tensor, path: Path) -> None:
    """Save inputs (n, 3, H, W) above their reconstructions, both uint8, as a PNG with titled rows."""
    assert inputs.shape == reconstructions.shape and inputs.dtype == reconstructions.dtype == torch.uint8
    bands = zip(inputs.cpu().split(COLUMNS), reconstructions.cpu().split(COLUMNS))
    rows = [row for band in bands for row in zip(("input", "reconstruction"), band)]
    _save(draw_sheet(rows, band=2), path)


def draw_sheet(rows: Sequence[tuple[str, Tensor]], band: int = 0) -> Image.Image:
    """Draw rows of images, uint8 (n, 3, H, W), each with a title at its left; a wide gap follows every ``band`` rows.

    Small images are enlarged.
    """
    height, width = rows[0][1].shape[2:]
    factor = max(1, ceil_div(_SMALLEST_SIDE, min(height, width)))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(size=14)
    margin = 12 + round(max(font.getlength(title) for title, _ in rows))
    tops = [_GAP + n * (height + _GAP) + (n // band * (_BAND_GAP - _GAP) if band else 0) for n in range(len(rows))]
    size = (margin + max(len(images) for _, images in rows) * (width + _GAP), tops[-1] + height + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for top, (title, images) in zip(tops, rows):
        draw.text((margin - 6, top + height // 2), title, fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            picture = to_picture(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * (width + _GAP), top))
    return sheet


def to_picture(image: Tensor) -> Image.Image:
    """Turn an image, uint8 (3, H, W) on the CPU, into one of PIL's."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def loss_curves(metrics: Path, path: Path) -> bool:
    """Draw every loss term in ``metrics`` (metrics.jsonl) over the steps, one panel each, as a PNG.

    The faint line shows the logged means, the strong one their running mean. Returns False, and logs why, when
    there is nothing to draw or matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("%s is not drawn: matplotlib is not installed (pip install matplotlib)", path)
        return False
    curves = _curves(metrics)
    if not curves:
        log.warning("%s is not drawn: %s has no loss terms yet", path, metrics)
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4 if len(curves) > 6 else 3, len(curves))
    rows = ceil_div(len(curves), columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, (axis, (name, (steps, values))) in enumerate(zip(axes, curves.items())):
        axis.plot(steps, values, color="#9db8d9", linewidth=0.9)
        axis.plot(steps, smoothed(values), color="#1f4e8c", linewidth=1.8)
        axis.set_title(TITLES.get(name, name), fontsize=10)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if index >= len(curves) - columns:
            axis.set_xlabel("step", fontsize=9)
    for axis in axes[len(curves):]:
        axis.set_visible(False)
    canvas.draw()
    _save(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()), path)
    return True


def smoothed(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the centred running mean over a twentieth of the curve, 1 to 25 points; at the edges it has fewer."""
    y = np.asarray(values, dtype=float)
    half = min(_SMOOTHING, max(1, len(y) // 20)) // 2
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def _curves(metrics: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return term -> (steps, values), the known terms first and in the order of ``TITLES``."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in read_metrics(metrics):
        if record.get("kind") != "step":
            continue
        for name, value in record["terms"].items():
            if value is not None:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    order = {name: index for index, name in enumerate(TITLES)}
    return dict(sorted(curves.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _save(picture: Image.Image, path: Path) -> None:
    """Write a PNG file and rename it into place, so that a viewer never sees half a picture."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, file.getvalue())
