"""Watches over the numbers of a run, which warn in words when one stays low."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

PATIENCE = 5  # lines in a row; a single one may be low by chance


@dataclass(frozen=True)
class Watch:
    """A level below which a number means trouble.

    Attributes:
        term: the number's name among the terms of a line.
        least: the lowest value that is no trouble.
        after: the number of steps from which on it is looked at.
        message: what it means; "{value}" stands for the value.
        remedy: what to try.
    """

    term: str
    least: float
    after: int
    message: str
    remedy: str


class Watches:
    """Tells which watches are due, each once: those whose number was low in ``PATIENCE`` lines in a row."""

    def __init__(self, watches: Sequence[Watch]):
        self._watches = list(watches)
        self._low: Counter[str] = Counter()

    def due(self, done: int, terms: Mapping[str, float]) -> Iterator[dict[str, str]]:
        """Yield the fields of a warning for each that is due with the line of step ``done``."""
        for watch in tuple(self._watches):
            value = terms[watch.term]
            low = done > watch.after and value < watch.least
            self._low[watch.term] = self._low[watch.term] + 1 if low else 0
            if self._low[watch.term] == PATIENCE:
                self._watches.remove(watch)
                message = watch.message.format(value=f"{value:.2g}")
                yield {"term": watch.term, "message": message, "remedy": watch.remedy}
