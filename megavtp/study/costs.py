"""What the links of a study cost: operations, and hours by the rates that were measured or given."""

from dataclasses import dataclass

from megavtp.study.config import CostConfig
from megavtp.study.links import Link
from megavtp.study.record import is_finished, read_record

START = "start"  # the name, among the given seconds, of what every link takes before it works


@dataclass(frozen=True)
class Rates:
    """How fast links are.

    Attributes:
        flops_per_second: of trainings, by kind; "" is the rate of kinds that are not there.
        seconds: of a link that is no training, by kind.
        start: seconds that every training takes before it works.
    """

    flops_per_second: dict[str, float]
    seconds: dict[str, float]
    start: float

    def estimate(self, link: Link) -> float | None:
        """Return the seconds that a link takes; None if nothing is known about its kind."""
        if not link.flops:
            return self.seconds.get(link.kind)
        rate = self.flops_per_second.get(link.kind, self.flops_per_second.get(""))
        return None if rate is None else self.start + link.flops / rate


def rates_of(links: list[Link], given: CostConfig) -> Rates:
    """Return the rates of the links that have finished without a break; for other kinds, those that are given."""
    start = given.seconds.get(START, 0.0)
    rates = {} if given.flops_per_second is None else {"": given.flops_per_second}
    seconds = {kind: value for kind, value in given.seconds.items() if kind != START}
    measured: dict[str, list[tuple[float, float]]] = {}
    for link in links:
        record = read_record(link)
        if record is not None and record.whole and is_finished(link, record):
            measured.setdefault(link.kind, []).append((link.flops, record.seconds))
    for kind, pairs in measured.items():
        took = sum(time for _, time in pairs)
        if flops := sum(count for count, _ in pairs):
            rates[kind] = flops / max(took - start * len(pairs), took / 10, 1e-9)
        else:
            seconds[kind] = took / len(pairs)
    return Rates(rates, seconds, start)
