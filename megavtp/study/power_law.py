"""Fit y = a (x + b)^-c + d to many sets of points at once.

The form is a saturating power law, as in scaling studies of CLIP (arXiv 2506.04598): it falls to d for a > 0 and rises
to d for a < 0. For given b and c it is linear in a and d, so that only b and c are searched (variable projection). A
grid over both gives the starts, and damped Gauss-Newton steps with Huber's weights go on from there.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_EXPONENTS = np.geomspace(0.05, 4.0, 24)
# Of the geometric mean of x. A shift far beyond the data makes an exponential of the power law.
_SHIFTS = np.concatenate([[0.0], np.geomspace(0.01, 10.0, 13)])
_LEAST, _MOST = np.array([0.0, np.log(0.02)]), np.array([30.0, np.log(8.0)])  # of b and log c
_TINY = 1e-300
_LEAST_GAIN = 1e-10  # of the loss, for a step to be taken
_STUCK = 1e3  # a damping from which on steps are too short to gain anything


@dataclass(frozen=True)
class PowerLaws:
    """Parameters of m curves, each of shape (m,)."""

    a: Array
    b: Array
    c: Array
    d: Array

    def at(self, x: Array) -> Array:
        """Return the values (m, k) at places (k,) that all curves share, or at a row (m, k) of places of each."""
        return self.a[:, None] * (x + self.b[:, None]) ** -self.c[:, None] + self.d[:, None]

    def __getitem__(self, index: slice | NDArray[np.int64]) -> "PowerLaws":
        return PowerLaws(self.a[index], self.b[index], self.c[index], self.d[index])


@dataclass(frozen=True)
class _State:
    """Where the search of each of m curves is: (m, 2) of b and log c, and what follows from it."""

    at: Array
    shape: Array  # (m, n): (x + b)^-c
    slope: Array  # (m,)
    level: Array
    residual: Array  # (m, n)
    weight: Array
    loss: Array


def fit_power_laws(
    x: Array, y: Array, delta: Array, *, shift: bool = True, start: PowerLaws | None = None, steps: int = 40
) -> PowerLaws:
    """Fit m curves to their points by Huber's loss.

    Args:
        x: places (n,), positive.
        y: values (m, n).
        delta: (m,), the residual from which on a curve's loss grows linearly; inf makes least squares of it.
        shift: whether b is fitted; it is 0 otherwise.
        start: a further place to start from, besides the grid's best ones.
    """
    unit = float(np.exp(np.log(x).mean()))
    middle = y.mean(axis=1)
    scale = np.maximum(y.std(axis=1), 1e-9 * np.abs(middle))
    scale[scale == 0] = 1
    places, values, limit = x / unit, (y - middle[:, None]) / scale[:, None], delta / scale
    starts = _grid_starts(places, values, shift)
    if start is not None:  # a curve that is known already needs one start of the grid beside it
        own = np.stack([start.b / unit, np.log(start.c)], axis=1)
        starts = [starts[0], np.broadcast_to(own, (len(y), 2))]
    best: _State | None = None
    for at in starts:
        found = _descend(places, values, limit, np.clip(at, _LEAST, _MOST), shift, steps)
        best = found if best is None else _choose(found.loss < best.loss, found, best)
    assert best is not None
    c = np.exp(best.at[:, 1])
    return PowerLaws(best.slope * scale * unit**c, best.at[:, 0] * unit, c, best.level * scale + middle)


def _grid_starts(x: Array, y: Array, shift: bool) -> list[Array]:
    """Return the best node of the grid for each curve by least squares, and the best of each third of exponents."""
    shifts = _SHIFTS if shift else _SHIFTS[:1]
    nodes = np.array([(b, np.log(c)) for c in _EXPONENTS for b in shifts])
    basis = (x + nodes[:, :1]) ** -np.exp(nodes[:, 1:])
    basis = basis - basis.mean(axis=1, keepdims=True)
    basis /= np.maximum(np.sqrt((basis**2).sum(axis=1, keepdims=True)), _TINY)
    explained = (y @ basis.T) ** 2  # (m, nodes): y is centred
    thirds = np.array_split(np.arange(len(nodes)), 3)
    return [nodes[explained.argmax(axis=1)], *(nodes[part[explained[:, part].argmax(axis=1)]] for part in thirds)]


def _descend(x: Array, y: Array, delta: Array, at: Array, shift: bool, steps: int) -> _State:
    """Search from ``at`` on. A step that does not lower the loss is taken back, and the next one is shorter."""
    weight = np.ones_like(y)
    for _ in range(3):  # weights for the start
        state = _evaluate(x, y, delta, at, weight)
        weight = state.weight
    damping = np.full(len(y), 1e-2)
    for _ in range(steps):
        proposed = np.clip(state.at + _step(x, state, damping, shift), _LEAST, _MOST)
        found = _evaluate(x, y, delta, proposed, state.weight)
        better = found.loss < state.loss * (1 - _LEAST_GAIN)
        state = _choose(better, found, state)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e6)
        if damping.min() > _STUCK:
            break
    return state


def _evaluate(x: Array, y: Array, delta: Array, at: Array, weight: Array) -> _State:
    """Return the state at b and log c, where a and d are the best ones for the given weights."""
    shape = (x + at[:, :1]) ** -np.exp(at[:, 1:])
    total = weight.sum(axis=1)
    mean_shape, mean_y = (weight * shape).sum(axis=1) / total, (weight * y).sum(axis=1) / total
    centred = shape - mean_shape[:, None]
    slope = (weight * centred * y).sum(axis=1) / np.maximum((weight * centred**2).sum(axis=1), _TINY)
    level = mean_y - slope * mean_shape
    residual = y - slope[:, None] * shape - level[:, None]
    size, limit = np.abs(residual), delta[:, None]
    with np.errstate(invalid="ignore"):  # inf - inf, for least squares
        loss = np.where(size <= limit, residual**2 / 2, limit * (size - limit / 2)).sum(axis=1)
    return _State(at, shape, slope, level, residual, np.minimum(1, limit / np.maximum(size, _TINY)), loss)


def _step(x: Array, state: _State, damping: Array, shift: bool) -> Array:
    """Return the damped Gauss-Newton step (m, 2) in b and log c, with a and d following along."""
    base, exponent = x + state.at[:, :1], np.exp(state.at[:, 1:])
    weight = state.weight
    total = weight.sum(axis=1, keepdims=True)
    columns = [
        -state.slope[:, None] * exponent * state.shape / base,
        -state.slope[:, None] * exponent * state.shape * np.log(base),
    ]
    centred_shape = state.shape - (weight * state.shape).sum(axis=1, keepdims=True) / total
    norm = np.maximum((weight * centred_shape**2).sum(axis=1, keepdims=True), _TINY)
    for i, column in enumerate(columns):  # what a and d can do themselves is taken out
        column = column - (weight * column).sum(axis=1, keepdims=True) / total
        columns[i] = column - centred_shape * (weight * column * centred_shape).sum(axis=1, keepdims=True) / norm
    pull = np.stack([(weight * column * state.residual).sum(axis=1) for column in columns], axis=1)
    bb, bc, cc = ((weight * columns[i] * columns[j]).sum(axis=1) for i, j in ((0, 0), (0, 1), (1, 1)))
    # A parameter at its bound that is pulled outwards stays there, and the other one moves by itself.
    held = ((state.at <= _LEAST) & (pull < 0)) | ((state.at >= _MOST) & (pull > 0))
    if not shift:
        held[:, 0] = True
    pull = np.where(held, 0, pull)
    bc = np.where(held.any(axis=1), 0, bc)
    bb, cc = bb * (1 + damping) + 1e-12, cc * (1 + damping) + 1e-12
    determinant = np.maximum(bb * cc - bc**2, _TINY)
    step = np.stack([cc * pull[:, 0] - bc * pull[:, 1], bb * pull[:, 1] - bc * pull[:, 0]], axis=1)
    return np.clip(step / determinant[:, None], -1.0, 1.0)


def _choose(first: Mask, one: _State, other: _State) -> _State:
    """Return ``one`` where ``first`` (m,) says so, else ``other``."""
    chosen = {}
    for name, value in vars(one).items():
        chosen[name] = np.where(first if value.ndim == 1 else first[:, None], value, getattr(other, name))
    return _State(**chosen)
