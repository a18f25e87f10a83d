"""Damaged files, drawn from a seed: flipped bits, cuts, junk, and JSON with values that its reader does not expect."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megavtp.errors import UserError

# JSON texts: some of them no Python value would be written as.
VALUES = (
    "null", "true", "-1", "0", "0.5", "1e999", "1e18", "1000000000000", "NaN", '"x"', '""', '"\\ud800"', "[]", "{}",
    "9" * 30, "1" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 300 + "0" + "}" * 300,
)
_MARK, _TWICE = "<value>", "<key>"


def damaged(data: bytes, draw: random.Random) -> bytes:
    """``data`` with a bit flipped, cut off, continued by junk, or with junk in the midst."""
    at = draw.randrange(len(data))
    junk = draw.randbytes(draw.choice((1, 8, 600)))
    return draw.choice((
        lambda: data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :], lambda: data[:at],
        lambda: data + junk, lambda: data[:at] + junk + data[at:], lambda: data[:at] + junk + data[at + len(junk) :],
    ))()


def edited(text: bytes | str, draw: random.Random) -> bytes:
    """A JSON text with one value, key or pair of values changed; it need not be JSON afterwards."""
    tree = copy.deepcopy(json.loads(text))
    container, key = draw.choice(list(_places(tree)))
    keys = list(container) if isinstance(container, dict) else range(len(container))
    kind = draw.choice(("value", "value", "number", "delete", "twice", "add", "swap"))
    value = draw.choice(VALUES)
    if kind == "value":
        container[key] = _MARK
    elif kind == "number":
        old = container[key]
        plain = isinstance(old, int | float) and not isinstance(old, bool)
        container[key] = draw.choice((old + 1, old - 1, old * 1000, -old, old / 2)) if plain else _MARK
    elif kind == "delete":
        del container[key]
    elif kind == "swap":
        other = draw.choice(keys)
        container[key], container[other] = container[other], container[key]
    elif isinstance(container, dict):
        container[_TWICE] = _MARK
    else:
        container.insert(key, _MARK)
    name = draw.choice(list(keys)) if kind == "twice" else "added"
    whole = json.dumps(tree).replace(json.dumps(_MARK), value).replace(json.dumps(_TWICE), json.dumps(name))
    return whole.encode(errors="surrogatepass")


def either(data: bytes, draw: random.Random) -> bytes:
    """Mostly edited JSON, else damaged bytes."""
    return edited(data, draw) if draw.random() < 0.8 else damaged(data, draw)


def put(path: Path, data: bytes | str) -> None:
    """Give an existing file another content; in place, as some file systems flush a file that is emptied first."""
    with path.open("r+b") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.truncate()


def one_line(error: UserError) -> bool:
    return "\n" not in str(error) and len(str(error)) > 20


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items: Callable = tree.items if isinstance(tree, dict) else lambda: enumerate(tree)
    for key, value in list(items()):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)
