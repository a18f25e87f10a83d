"""The page, from the runs' folders to its text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from megavtp import __version__
from megavtp.report.charts import COLOURS, check_matplotlib, draw
from megavtp.report.folder import KINDS, Run, read_runs
from megavtp.report.measures import Measured, read_measures, shown, tables
from megavtp.report.pictures import Picture, read_pictures
from megavtp.report.series import groups_of
from megavtp.report.summary import (
    NOT_RECORDED,
    Setting,
    commands,
    differing,
    facts,
    notes,
    report_command,
    settings_of,
    state,
    warnings,
)

# Metrics that stand in a run's card, the first few of them that it has.
_HEADLINES = {
    "reconstruction/psnr": "PSNR", "reconstruction/lpips_vgg": "LPIPS", "knn/label_top1": "k-NN, label",
    "knn/group_top1": "k-NN, group", "zero_shot/label_top1": "zero-shot", "retrieval/image_to_text_r1": "caption R@1",
    "generation/gfid": "gFID", "generation/fd_efficientnet": "FD-EfficientNet",
    "generation/kd_efficientnet": "KD-EfficientNet", "generation/precision_efficientnet": "precision",
}
_MOST_HEADLINES = 4


@dataclass(frozen=True)
class Card:
    """What the page shows of one run. ``headlines`` are (name, value) of measures."""

    number: int
    label: str
    path: str
    kind: str
    state: tuple[str, str]
    progress: float
    headlines: Sequence[tuple[str, str]]
    facts: dict[str, str]
    warnings: Sequence[str]
    notes: Sequence[str]
    pictures: Sequence[Picture]
    commands: Sequence[tuple[str, str]]
    config: str


@dataclass(frozen=True)
class Settings:
    """Settings of the runs of one kind, named by number and label: those in which these differ, and all that are not
    the default."""

    kind: str
    runs: Sequence[tuple[int, str]]
    differing: Sequence[Setting]
    changed: Sequence[Setting]


def render_page(paths: Sequence[Path]) -> str:
    """Return the page about the runs in these folders, as HTML; equal folders give equal text.

    Raises:
        UserError: a folder is no run's, or matplotlib is not installed.
    """
    check_matplotlib()
    runs = read_runs(paths)
    measured = [read_measures(run) for run in runs]
    cards = [_card(number, runs, files) for number, files in enumerate(measured)]
    return render(
        "page.html", draw=draw, not_recorded=NOT_RECORDED, cards=cards, groups=groups_of(runs),
        tables=tables(runs, measured), settings=_settings(runs), report_command=report_command(runs),
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; every value is shown as text unless the template says that it is safe."""
    environment = Environment(
        loader=PackageLoader("megavtp.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )
    return environment.get_template(template).render(colours=COLOURS, version=__version__, **values)


def _card(number: int, runs: Sequence[Run], measured: dict[str, Measured]) -> Card:
    run = runs[number]
    pictures = read_pictures(run)  # before the warnings, among which are the pictures that cannot be read
    return Card(
        number=number, label=run.label, path=str(run.path), kind=KINDS[run.kind], state=state(run),
        progress=round(min(100.0, 100 * run.done / run.total), 1) if run.total else 0.0, headlines=_headlines(measured),
        facts=facts(run), warnings=warnings(run), notes=notes(run, runs), pictures=pictures, commands=commands(run),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
    )


def _headlines(measured: dict[str, Measured]) -> list[tuple[str, str]]:
    values = {name: value for file in measured.values() for name, value in file.metrics.items() if value is not None}
    found = [(title, shown(name, values[name])) for name, title in _HEADLINES.items() if name in values]
    return found[:_MOST_HEADLINES]


def _settings(runs: Sequence[Run]) -> list[Settings]:
    found = []
    for kind in KINDS:
        same = [(number, run) for number, run in enumerate(runs) if run.kind == kind]
        if same:
            changed = settings_of([run for _, run in same])
            labels = [(number, run.label) for number, run in same]
            found.append(Settings(KINDS[kind], labels, differing(changed), changed))
    return found
