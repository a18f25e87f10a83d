"""The bytes of a piece of a pass: held, needed and sent."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megavtp.parallel.mesh import Mesh
from megavtp.parallel.rehearsal import rehearse

Sent = Counter[tuple[str, str]]  # (axis, operation) -> payload bytes of one rank


@dataclass(frozen=True)
class Cost:
    """Bytes of one micro-batch on one rank.

    Attributes:
        held: alive from the end of its forward to its backward.
        peak: the most at one time while it runs alone, ``held`` included.
        forward, backward: bytes sent in each, by (axis, operation).
    """

    held: float = 0
    peak: float = 0
    forward: Sent = field(default_factory=Sent)
    backward: Sent = field(default_factory=Sent)

    @property
    def extra(self) -> float:
        """The bytes that are needed beyond ``held`` while it runs."""
        return self.peak - self.held


def cost_of(
    mesh: Mesh, forward: Callable[[], Any], parameters: Sequence[Tensor] = (), inputs: Sequence[Tensor] = ()
) -> Cost:
    """Rehearse ``forward`` and its backward, see ``parallel.rehearsal.rehearse``."""
    counted = rehearse(mesh, forward, parameters, inputs=inputs)
    return Cost(counted.held, counted.peak, counted.forward.sent, counted.backward.sent)


def line(a: Cost, b: Cost, t: float) -> Cost:
    """Return the cost at ``t`` on the straight line through ``a`` (t = 0) and ``b`` (t = 1)."""

    def at(x: float, y: float) -> float:
        return x + t * (y - x)

    def sent(x: Sent, y: Sent) -> Sent:
        return Counter({key: round(at(x[key], y[key])) for key in x.keys() | y.keys()})

    held = at(a.held, b.held)
    return Cost(held, held + at(a.extra, b.extra), sent(a.forward, b.forward), sent(a.backward, b.backward))
