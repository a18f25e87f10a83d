"""What the links of a study cost: operations, hours by the rates that were measured or given, and device-hours."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, takewhile

from megavtp.study.config import CostConfig
from megavtp.study.links import Link
from megavtp.study.record import Record, is_finished, read_record

# Options of launchers with the number of processes of a machine, or of all, and with the number of machines.
_PROCESSES = ("--num_gpus", "--num_accelerators", "--nproc_per_node", "--nproc-per-node", "--ntasks")
_MACHINES = ("--num_nodes", "--nnodes")
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


def devices_of(command: str) -> int | None:
    """Return how many processes, each on a device of its own, a link's command starts; None if it does not say."""
    launcher = list(takewhile(lambda word: not word.endswith(".py"), shlex.split(command)))
    if launcher == ["python"]:
        return 1
    words = [part for word in launcher for part in word.split("=")]
    numbers = {option: int(value) for option, value in pairwise(words) if value.isdigit()}
    each = next((numbers[option] for option in _PROCESSES if option in numbers), None)
    return each and each * next((numbers[option] for option in _MACHINES if option in numbers), 1)


def device_hours(records: Iterable[Record]) -> float | None:
    """Return the hours of links, each times its devices; None if it is not known how many these were."""
    total = 0.0
    for record in records:
        if (devices := devices_of(record.command)) is None:
            return None
        total += devices * record.seconds / 3600
    return total
