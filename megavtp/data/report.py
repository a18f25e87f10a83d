"""Skipped samples: how many, why, and which."""

from collections import Counter
from dataclasses import dataclass, field

from megavtp.errors import UserError


@dataclass
class SkipReport:
    """Counts what was kept and what was skipped; names the first ``named_limit`` of each reason."""

    kept: int = 0
    named_limit: int = 5
    reasons: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        return self.reasons.total()

    def skip(self, reason: str, name: str) -> None:
        self.reasons[reason] += 1
        names = self.named.setdefault(reason, [])
        if len(names) < self.named_limit:
            names.append("".join(c if c.isprintable() else "?" for c in name))  # names come from foreign files

    def limit(self, max_bad: int) -> None:
        """Raise ``UserError`` once more than ``max_bad`` samples were skipped."""
        if self.skipped > max_bad:
            raise UserError(f"more than {max_bad} bad samples (allow more with --max-bad): {'; '.join(self.lines())}")

    def lines(self) -> list[str]:
        """Return one line for each reason, the most frequent first."""
        return [
            f"{count} x {reason}: {', '.join(self.named[reason])}{', ...' if count > self.named_limit else ''}"
            for reason, count in self.reasons.most_common()
        ]
