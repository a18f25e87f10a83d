"""Draw one emoji. No torch is imported here, so that the drawing processes start quickly."""

import io
from dataclasses import dataclass

from PIL import Image

from megavtp.data.new_sample import NewSample, Skipped
from megavtp.data.sources.emoji_table import Emoji


@dataclass(frozen=True)
class Drawing:
    emoji: Emoji
    style: str
    svg: str
    size: int  # pixels of a side
    share: float  # of the side that the drawing with its own margin covers
    caption: str


def render(drawing: Drawing) -> NewSample | Skipped:
    """Draw a square PNG on white, with the caption and metadata of the emoji."""
    import resvg_py

    inner = round(drawing.size * drawing.share)
    try:
        png = resvg_py.svg_to_bytes(svg_path=drawing.svg, width=inner, background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        return Skipped("drawing not readable", f"{drawing.svg}: {error}")
    canvas = Image.new("RGB", (drawing.size, drawing.size), "white")
    with Image.open(io.BytesIO(png)) as picture:
        left, top = ((drawing.size - side) // 2 for side in picture.size)
        canvas.paste(picture.convert("RGB"), (left, top))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    emoji = drawing.emoji
    meta = {
        "concept": emoji.concept, "name": emoji.name, "group": emoji.group, "subgroup": emoji.subgroup,
        "style": drawing.style, "base": emoji.base,
    }
    return NewSample(f"{emoji.code.lower()}_{drawing.style}", file.getvalue(), "png", drawing.caption, meta)
