"""These choose which samples to draw; a sample's noise is a function of the seed, its condition and a number."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavtp.config.sizes import known
from megavtp.data.randomness import generator
from megavtp.dit.checkpoint import StoredDiT
from megavtp.errors import UserError


@dataclass(frozen=True)
class Sample:
    """An image to draw: its label or caption, and its number (from 0) among those with the same condition."""

    condition: int | str
    index: int


def each(conditions: Sequence[int | str], count: int) -> list[Sample]:
    """List ``count`` samples of each condition, condition by condition."""
    return [Sample(condition, index) for condition in conditions for index in range(count)]


def in_proportion(weights: Sequence[float], count: int) -> list[Sample]:
    """List ``count`` samples of the labels 0, 1, ... in the given proportions, by the largest remainders.

    Weighted by a data set's images, each class has as many samples as a random draw from it has on average. With equal
    weights, all classes have equally many, or the first ones one more.
    """
    return [Sample(label, index) for label, number in enumerate(shares(weights, count)) for index in range(number)]


def shares(weights: Sequence[float], count: int) -> list[int]:
    """Divide ``count`` in the given proportions, by the largest remainders."""
    exact = np.asarray(weights, dtype=np.float64)
    exact = exact * (count / exact.sum())
    counts = np.floor(exact).astype(int)
    first = np.argsort(counts - exact, kind="stable")[: count - int(counts.sum())]
    counts[first] += 1
    return counts.tolist()


def samples_of(dit: StoredDiT, classes: str | None, captions: list[str] | None, per_class: int) -> list[Sample]:
    """Return the samples that the options of ``tools/sample.py`` ask for. UserError if they do not fit the DiT."""
    model = dit.config.model
    if model.condition == "caption":
        if captions is None or classes is not None:
            raise UserError('this DiT is conditioned on captions: give --caption "..." and no --classes')
        return each(captions, per_class)
    num_classes = known(model.num_classes, "model.num_classes")
    if classes is None or captions is not None:
        raise UserError(
            f"this DiT is conditioned on classes: give --classes, some of 0 to {num_classes - 1} or all, and no "
            "--caption"
        )
    if classes.strip() == "all":
        return each(range(dit.trained_classes), per_class)
    return each(parse_classes(classes, num_classes, dit.classes), per_class)


def names_of(dit: StoredDiT, samples: Sequence[Sample]) -> list[str]:
    conditions = [sample.condition for sample in samples]
    return [value if isinstance(value, str) else dit.class_name(value) for value in conditions]


def parse_classes(text: str, num_classes: int, names: Sequence[str] | None) -> list[int]:
    """Parse labels such as "3,7" or "Flags,Symbols". UserError for one that the DiT does not know."""
    return [_label(part.strip(), num_classes, names) for part in text.split(",")]


def _label(part: str, num_classes: int, names: Sequence[str] | None) -> int:
    if part.isdecimal():
        if int(part) >= num_classes:
            raise UserError(f"--classes {part}: the DiT has {num_classes}, 0 to {num_classes - 1}{_list(names)}")
        return int(part)
    if not names:
        raise UserError(
            f"--classes {part!r}: this DiT does not know its classes' names; give numbers, 0 to {num_classes - 1}"
        )
    lower = [name.lower() for name in names]
    if part.lower() not in lower:
        near = difflib.get_close_matches(part.lower(), lower, 1)
        hint = f"; the nearest is {names[lower.index(near[0])]!r}" if near else _list(names)
        raise UserError(f"--classes {part!r}: this DiT has no class of that name{hint}")
    return lower.index(part.lower())


def _list(names: Sequence[str] | None) -> str:
    return ": " + ", ".join(names[:20]) + ", ..." * (len(names) > 20) if names else ""


def sample_noise(
    seed: int, samples: Sequence[Sample], shape: tuple[int, ...], device: torch.device | str
) -> Callable[[], Tensor]:
    """Return a function that draws unit normal values (b, *shape), float32 on the device, new ones at each call.

    A sample's sequence of draws depends on (seed, condition, index) alone, not on the batch, the process or the device.
    """
    generators = [generator(seed, "sample", sample.condition, sample.index) for sample in samples]

    def draw() -> Tensor:
        draws = [g.standard_normal(shape, dtype=np.float32) for g in generators]
        return torch.from_numpy(np.stack(draws)).to(device, non_blocking=True)

    return draw
