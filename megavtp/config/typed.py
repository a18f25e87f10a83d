"""Plain nested mappings -> frozen dataclasses, with strict types and errors that name the dotted key."""

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megavtp.errors import UserError

_LONGEST_KEY = 100  # characters; comparing a longer key with all known keys would take long
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")


def all_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every section and every key of ``cls``."""
    for name, kind in get_type_hints(cls).items():
        yield prefix + name
        if is_dataclass(kind):
            yield from all_keys(kind, f"{prefix}{name}.")


def unknown(path: str, root: type) -> UserError:
    """Return the error for an unknown key; it suggests a similar key of any section, if there is one."""

    def ratio(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    def near(candidate: str) -> float:
        return 0.6 * ratio(path.rpartition(".")[2], candidate.rpartition(".")[2]) + 0.4 * ratio(path, candidate)

    best = max(all_keys(root), key=near) if len(path) < _LONGEST_KEY else ""
    if not best or near(best) < 0.6:
        file = root.__module__.replace(".", "/") + ".py"
        return UserError(f"{path[:_LONGEST_KEY]}: unknown key; the keys and their meaning are in {file}")
    return UserError(f"{path}: unknown key; did you mean {best}?")


def describe(kind: Any) -> str:
    """Describe a type in words, for messages."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args)) if len(args) > 1 else repr(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if kind is types.NoneType:
        return "null"
    if origin is tuple:
        which = f"{describe(args[0]).removeprefix('a ')}s" if args[-1] is Ellipsis else f"{len(args)} numbers"
        return f"a list of {which}"
    if origin is dict:
        return "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]


def convert(value: Any, kind: Any, path: str, expected: str | None = None) -> Any:
    """Convert ``value`` to ``kind``; a UserError names ``path``, what is expected and what was given."""
    origin, args = get_origin(kind), get_args(kind)
    expected = expected or describe(kind)
    wrong = UserError(f"{path}: expected {expected}, got {described(value)}")
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (a for a in args if a is not types.NoneType)
        return convert(value, inner, path, expected)
    if origin is Literal:
        if (type(value), value) not in [(type(allowed), allowed) for allowed in args]:  # True == 1, no ZeRO stage
            raise wrong
        return value
    if origin is tuple:
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis and isinstance(value, (list, tuple)) else args
        if not isinstance(value, (list, tuple)) or len(kinds) != len(value):
            raise wrong
        return tuple(convert(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, kinds)))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise wrong
        return {k: v if args[1] is Any else convert(v, args[1], f"{path}.{k}") for k, v in value.items()}
    if kind is float and (type(value) is int or (isinstance(value, str) and _NUMBER.fullmatch(value))):
        value = float(value)  # YAML 1.1 reads 1e-3, which has no dot, as a string
    if type(value) is not kind or value == "":
        raise wrong
    if kind is float and not math.isfinite(value):
        raise UserError(f"{path}: must be finite, got {value}")
    return value


def described(value: Any) -> str:
    """Return a value with its type, for messages."""
    return f"{value!r} ({'null' if value is None else type(value).__name__})"
