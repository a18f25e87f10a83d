"""The ranges that a setting's type states, and the functions that all rules are written with."""

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from megavtp.errors import UserError

INF = float("inf")
# These bounds of a model lie far above what is ever trained. A larger number is a slip or damage, and must be refused
# before memory is allocated for it.
MAX_WIDTH, MAX_DEPTH, MAX_PIXELS, MAX_ROWS = 65_536, 256, 8192, 16_777_216
# A whole number whose rule has no upper end may be at most this: a larger one is a slip that would show only late.
_MOST = 1_000_000_000
_MOST_OF = {
    "workers": 1024, "prefetch": 1024, "batch_size": 16_777_216, "local_crops": 256, "pictures": 1024,
    "max_pixels": 10_000_000_000, "sinkhorn_iterations": 1000,
}


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, as part of a setting's type."""

    low: float
    high: float = INF
    above: bool = False  # ``low`` itself is excluded


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Pixels = Annotated[int, Range(1, MAX_PIXELS)]
Width = Annotated[int, Range(1, MAX_WIDTH)]
Depth = Annotated[int, Range(1, MAX_DEPTH)]
Rows = Annotated[int, Range(1, MAX_ROWS)]
Tokens = Annotated[int, Range(2, MAX_WIDTH)]  # of a text
NotNegative = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(0, above=True)]
Fraction = Annotated[float, Range(0, 1)]


def need(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition``."""
    if not condition:
        raise UserError(message)


def divides(small: int, big: int, small_key: str, big_key: str, remedy: str) -> None:
    need(small > 0 and big % small == 0, f"{big_key} = {big} is not a multiple of {small_key} = {small}: {remedy}")


def within(config: Any, prefix: str, low: float, high: float, *names: str) -> None:
    """Check that each number that is given lies between ``low`` and ``high``; whole ones are at most ``_MOST``."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            most = _MOST_OF.get(name, _MOST) if high == INF and isinstance(number, int) else high
            wanted = f"at least {low:g}" if high == INF else f"between {low:g} and {high:.8g}"
            wanted = f"at most {most:,}" if number > most != high else wanted
            need(low <= number <= most, f"{prefix}.{name} = {value}: must be {wanted}")


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check that each number in a section, and in the sections in it, is in the ``Range`` of its type. UserError."""
    for name, kind in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if is_dataclass(value):
            check_ranges(value, f"{prefix}{name}.")
        for part in (kind, *get_args(kind)):  # in an optional type or a tuple, the range is inside
            for found in getattr(part, "__metadata__", ()):
                need(not found.above or value > found.low, f"{prefix}{name} = {value}: must be above {found.low:g}")
                within(section, prefix.removesuffix("."), found.low, found.high, name)


def ordered(config: Any, prefix: str, *names: str) -> None:
    """Check that each key is a range (low, high) with 0 <= low <= high <= 1."""
    for name in names:
        low, high = getattr(config, name)
        need(0 <= low <= high <= 1, f"{prefix}.{name} = [{low:g}, {high:g}]: must have 0 <= low <= high <= 1")


def check_run(config: Any, towers: Sequence[str]) -> None:
    """Check each number of a run by itself, and the rules of those that every kind of run has. ``towers`` are those
    whose learning rate can be scaled."""
    check_ranges(config)
    train, optimizer = config.train, config.train.optimizer
    need(0 <= config.seed < 2**63, f"seed = {config.seed}: must be between 0 and 2**63 - 1")
    need(max(optimizer.betas) < 1, f"train.optimizer.betas = {list(optimizer.betas)}: each must be below 1")
    need(
        optimizer.warmup_steps <= train.steps,
        f"train.optimizer.warmup_steps = {optimizer.warmup_steps} exceeds train.steps = {train.steps}: shorten it",
    )
    need(
        optimizer.min_lr <= optimizer.lr,
        f"train.optimizer.min_lr = {optimizer.min_lr} exceeds train.optimizer.lr = {optimizer.lr}: lower min_lr",
    )
    need(
        optimizer.cooldown is None or 0 <= optimizer.cooldown <= 1,
        f"train.optimizer.cooldown = {optimizer.cooldown}: must be a fraction of the steps, between 0 and 1, or null",
    )
    for name, scale in optimizer.lr_scale.items():
        need(name in towers, f"train.optimizer.lr_scale.{name}: no such tower; the towers are {', '.join(towers)}")
        need(scale >= 0, f"train.optimizer.lr_scale.{name} = {scale}: must be at least 0")
    peak = config.telemetry.peak_tflops
    need(peak is None or peak > 0, f"telemetry.peak_tflops = {peak}: must be above 0, or null")
