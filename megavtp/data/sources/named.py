"""Data sets that a recipe may name with ``data.source``, each made without a question asked."""

from collections.abc import Callable
from pathlib import Path

from megavtp.errors import UserError


def _emoji(root: Path) -> None:
    from megavtp.data.sources.emoji import prepare_emoji  # whoever trains on other data needs none of it

    # Skin tones are more than half of the set and nearly alike: a run of minutes learns more without them.
    prepare_emoji(root, skin_tones=False)


SOURCES: dict[str, Callable[[Path], None]] = {"emoji": _emoji}


def check_source(name: str | None) -> None:
    """UserError unless ``name`` is a source, or none is named."""
    if name is not None and name not in SOURCES:
        raise UserError(
            f"data.source = {name}: no such source; choose one of {', '.join(SOURCES)}, or set data.source=null and "
            "fill data.root with tools/prepare_data.py"
        )
