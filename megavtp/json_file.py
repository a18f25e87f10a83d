"""JSON from a file is checked against a form before it is used: types, bounds, unknown keys."""

import codecs
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic import dataclasses as pydantic_dataclasses

from megavtp.errors import UserError

T = TypeVar("T")
# Every file of ours keeps to these bounds. A number beyond them is damage, and would fail deep in a library.
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Positive = Annotated[int, Field(gt=0, lt=1 << 53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

_STRICT = ConfigDict(cache_strings="keys", strict=True, extra="forbid", allow_inf_nan=False)
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


@dataclass_transform(frozen_default=True)
def form(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose values must have exactly their types, and that refuses unknown keys.

    A file that has versions has a field ``version: Literal[1]``; the error for another version says so.
    """
    return cast(type[T], pydantic_dataclasses.dataclass(frozen=True, config=_STRICT)(cls))


@dataclass_transform(frozen_default=True)
def foreign_form(cls: type[T]) -> type[T]:
    """Make a form for a file of another project, which may hold keys that nothing here reads."""
    return cast(type[T], pydantic_dataclasses.dataclass(frozen=True, config={**_STRICT, "extra": "ignore"})(cls))


def read_json(path: Path, expected: type[T], remedy: str) -> T:
    """Read a JSON file in the expected form: a ``form``, or a plain type such as ``dict[str, Any]``.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else; the message ends in ``remedy``.
    """
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # some editors put it there
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    return parse_json(text, expected, str(path), remedy)


def parse_json(text: bytes | str, expected: type[T], where: str, remedy: str) -> T:
    """Do the same for a text; ``where`` names it in the message."""
    try:
        return _adapter(expected).validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(f"{where} {_first(error)}; {remedy}") from None


def check_form(value: Any, expected: type[T], where: str, remedy: str) -> T:
    """Do the same for a value that is already parsed, such as a part of a larger file."""
    # As text, because a strict check takes a list for a tuple only there.
    return parse_json(json.dumps(value), expected, where, remedy)


def _first(error: ValidationError) -> str:
    """Say what is wrong: another version, which explains all other faults, or the first fault and its place."""
    faults = error.errors(include_url=False)
    for fault in faults:
        if fault["loc"] == ("version",) and fault["type"] == "literal_error":
            found, known = fault["input"], fault["ctx"]["expected"]
            return f"has format version {repr(found)[:50]}, this MegaVTP reads {known} (another wrote it)"
    first = faults[0]
    place = repr(".".join(str(key) for key in first["loc"]))[1:-1][:200]  # keys are the file's, whatever they hold
    text = first["msg"].replace("Invalid JSON:", "not JSON:")
    return f"is damaged or of another kind ({f'{place}: ' if place else ''}{text})"
