"""Plain nested mappings -> frozen dataclasses, with strict types and errors that name the dotted key."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megavtp.errors import UserError

_LONGEST_KEY = 100  # characters; comparing a longer key with all known keys would take long
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Return the resolved type of each field of a dataclass, in the order of its fields."""
    found = get_type_hints(cls)
    return {f.name: found[f.name] for f in fields(cls)}


def is_section(kind: Any) -> bool:
    """Whether a type is a dataclass of further keys."""
    return is_dataclass(kind)


def all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every section and every key of ``cls``."""
    for name, kind in hints(cls).items():
        yield prefix + name
        if is_section(kind):
            yield from all_keys(kind, f"{prefix}{name}.")


def unknown(path: str, root: type) -> UserError:
    """Return the error for an unknown key; it suggests a similar key of any section, if there is one."""

    def near(candidate: str) -> float:
        ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()  # noqa: E731
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
        if args[-1] is Ellipsis:
            return f"a list of {describe(args[0])}s".replace("a list of a ", "a list of ")
        return f"a list of {len(args)} numbers"
    if origin is dict or is_section(kind):
        return "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]


def convert(value: Any, kind: Any, path: str, expected: str | None = None) -> Any:
    """Convert ``value`` to ``kind``; a UserError names ``path``, what is expected and what was given."""
    origin, args = get_origin(kind), get_args(kind)
    expected = expected or describe(kind)
    wrong = UserError(f"{path}: expected {expected}, got {value!r} ({_name(value)})")
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (a for a in args if a is not types.NoneType)
        return convert(value, inner, path, expected)
    if origin is Literal:
        for allowed in args:
            if value == allowed and type(value) is type(allowed):  # True == 1, but is not a ZeRO stage
                return allowed
        raise wrong
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise wrong
        return tuple(convert(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, kinds)))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise wrong
        return {k: v if args[1] is Any else convert(v, args[1], f"{path}.{k}") for k, v in value.items()}
    if kind is float:
        return _as_float(value, path, wrong)
    if type(value) is not kind or value == "":
        raise wrong
    return value


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _as_float(value: Any, path: str, wrong: UserError) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-3, which has no dot, as a string
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong
    if not math.isfinite(value):
        raise UserError(f"{path}: must be finite, got {value}")
    return float(value)


def build(cls: type, values: Any, root: type | None = None, prefix: str = "") -> Any:
    """Make a ``cls`` from a nested mapping; a section that is absent or null takes its defaults."""
    root = root or cls
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the config"
        raise UserError(f"{where}: expected a mapping of keys, got {values!r} ({_name(values)})")
    kinds, made = hints(cls), {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in kinds:
            raise unknown(path, root)
        kind = kinds[key]
        made[key] = build(kind, value, root, f"{path}.") if is_section(kind) else convert(value, kind, path)
    return cls(**made)
