"""Panels as SVG that stands in the page and takes its colours from it, in light and in dark."""

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavtp.errors import UserError
from megavtp.report.series import Panel
from megavtp.training.pictures import smoothed

COLOURS = 8  # of runs, before they repeat with dashes
# matplotlib draws in these colours, which stand for the page's: its style sheet says what they look like.
_TEXT, _GRID, _LEVEL, _RUN = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0c{:02x}"
_PAGE = {
    _TEXT: "var(--faint)", _GRID: "var(--grid)", _LEVEL: "var(--faint)",
    **{_RUN.format(number): f"var(--run{number})" for number in range(COLOURS)},
}
_SIZE = (3.7, 2.05)  # inches; the page scales it
_PLACE = (0.15, 0.13, 0.83, 0.82)  # of the axes, alike in all panels: left, bottom, width and height as shares
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def check_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('curves are drawn by matplotlib, which is not installed: pip install "megavtp[eval]"')


@dataclass(frozen=True)
class Fitted:
    """One line's points (n, 2) of x and y over a logarithmic x, and its curve (k, 4): x, y and the interval's ends."""

    number: int
    points: np.ndarray
    curve: np.ndarray


def draw_fitted(title: str, lines: Sequence[Fitted]) -> str:
    """Draw points with the curves through them and their intervals as an SVG element; equal lines give equal text."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    with _chart(title) as (axis, done):
        for line in lines:
            colour = _RUN.format(line.number % COLOURS)
            axis.plot(line.points[:, 0], line.points[:, 1], "o", color=colour, markersize=4)
            if len(line.curve):
                x, y, low, high = line.curve.T
                axis.plot(x, y, color=colour, linewidth=1.8)
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        least, most = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1000 * least else (1,), numticks=9))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20T
    return done[0]


def draw(panel: Panel) -> str:
    """Draw a panel as an SVG element; equal panels give equal text."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with _chart(panel.title) as (axis, done):
        top = panel.top
        for curve in panel.curves:
            values = curve.values if top is None else np.minimum(curve.values, top)
            colour, dash = _RUN.format(curve.run % COLOURS), "-" if curve.run < COLOURS else (0, (4, 1.5))
            marker = "o" if len(curve.steps) < 2 else None
            if panel.smooth and len(curve.steps) > 8:
                axis.plot(curve.steps, values, color=colour, linewidth=0.8, alpha=0.35)
                axis.plot(curve.steps, smoothed(values), color=colour, linewidth=1.8, linestyle=dash)
            else:
                axis.plot(curve.steps, values, color=colour, linewidth=1.8, linestyle=dash, marker=marker)
        if panel.level is not None:
            axis.axhline(panel.level, color=_LEVEL, linewidth=1.0, linestyle=(0, (2, 2)))
        if panel.unit == "%":
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.text(value)))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return done[0]


@contextlib.contextmanager
def _chart(title: str) -> Iterator[tuple[Any, list[str]]]:
    """Yield an empty axis, and a list into which its SVG element comes when all is drawn."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    done: list[str] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc says
        matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, in the page's font
        matplotlib.rcParams["svg.hashsalt"] = title  # ids are random without one
        figure = Figure(figsize=_SIZE)
        FigureCanvasSVG(figure)
        axis = figure.add_axes(_PLACE)
        axis.yaxis.set_major_locator(MaxNLocator(4))
        yield axis, done
        axis.grid(color=_GRID, linewidth=0.7)
        axis.tick_params(labelsize=9, length=0, colors=_TEXT)
        axis.yaxis.get_offset_text().set(color=_TEXT, fontsize=8)
        axis.spines[:].set_visible(False)
        axis.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    done.append(_for_the_page(file.getvalue()))


def _for_the_page(svg: str) -> str:
    """Return the element alone, without a fixed size, in the page's colours."""
    element = svg[svg.index("<svg ") :].strip()
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    for drawn, shown in _PAGE.items():
        rest = rest.replace(drawn, shown)
    return f'{head} aria-hidden="true">{rest}'
