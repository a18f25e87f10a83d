"""A method that runs once for the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


def once(method: Method) -> Method:
    """Run a method once for the same arguments; its object keeps what it returned."""

    @wraps(method)
    def known_or_made(self: Any, *arguments: Any) -> Any:
        known = vars(self).setdefault("_known", {})
        key = (method.__name__, *arguments)
        if key not in known:
            known[key] = method(self, *arguments)
        return known[key]

    return cast(Method, known_or_made)
