"""The settings of a study, as frozen dataclasses. An unknown key is refused; ``load_study`` checks the rules."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megavtp.config.load import load_config, to_yaml
from megavtp.data.files import write_atomic
from megavtp.errors import UserError
from megavtp.study.links import KINDS

Stage = Literal["tokenizer", "decoder", "dit"]
STAGES: tuple[Stage, ...] = ("tokenizer", "decoder", "dit")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# By key, the options of its tool that the study sets.
_OWN_OPTIONS = {
    "latents": ("--tokenizer", "--out"), "measures.tokenizer": ("--checkpoint", "--pictures", "--out"),
    "measures.generation": ("--dit", "--tokenizer", "--seed", "--out"),
    "measures.samples": ("--dit", "--tokenizer", "--seed", "--out"),
}
STUDY = "study.yaml"  # in the study's folder: the study as it was last started or submitted
# Columns of the table of results that are no axes.
COLUMNS = ("cell", "steps", "seed", "samples", "flops", "all_flops", "encoder_parameters")


@dataclass(frozen=True)
class StageConfig:
    """One kind of training in a cell. ``recipe`` None leaves the decoder or the DiT out."""

    recipe: str | None = None
    settings: tuple[str, ...] = ()  # key=value, over the recipe's


@dataclass(frozen=True)
class MeasureConfig:
    """Options of the commands that measure, besides the places and the seed, in one line; None leaves one out."""

    tokenizer: str | None = None  # tools/evaluate.py, such as --data data/emoji
    generation: str | None = None  # tools/evaluate.py generation, such as --reference data/emoji --samples 2000
    samples: str | None = None  # tools/sample.py, such as --classes all: a sheet of pictures


@dataclass(frozen=True)
class CurveConfig:
    """Which curves are fitted to the results: one for each measure and each choice on the axes that are not ``x``."""

    x: str = "flops"  # of the tokenizer's pre-training; or samples; or an axis whose choices are numbers
    better: dict[str, Literal["lower", "higher"]] = field(default_factory=dict)  # the measures, and what is better
    held_out: int = 1  # the largest points, which the others are to predict
    baseline: str | None = None  # a choice on an axis with which the others are compared; None: all with all
    repeats: str | None = None  # an axis whose choices are but repetitions, of which the mean is taken, as of the seeds


@dataclass(frozen=True)
class CostConfig:
    """What ``plan`` reckons with until links have been measured."""

    flops_per_second: float | None = None  # that the trainings reach, on all devices together
    # By kind of link, for what is no training: convert, evaluate, latents, generate, draw; and start, of every link.
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SlurmConfig:
    """How ``run --launch slurm`` makes jobs of links: options of sbatch, each of which wins over the line before."""

    template: str | None = None  # a batch script that runs "$@"; None is launchers/slurm/study.sbatch
    options: str | None = None  # over the template's, such as --partition=gpu --account=vision --time=12:00:00
    by_kind: dict[str, str] = field(default_factory=dict)  # over these, such as convert: --ntasks=1 --gres=none
    launcher: str = "srun --kill-on-bad-exit=0 --wait=120 python -u"  # starts the processes of a link in its job


@dataclass(frozen=True)
class StudyConfig:
    output_dir: str = "runs/study"
    launcher: str = "deepspeed"  # what starts the processes of a link, such as deepspeed --num_accelerators 2
    # name: {choice: {tokenizer: [key=value, ...], decoder: [...], dit: [...]}}. The study has all combinations.
    axes: dict[str, dict[str, dict[str, tuple[str, ...]]]] = field(default_factory=dict)
    looks: tuple[int, ...] = ()  # the steps of pre-training at which a tokenizer is looked at
    # checkpoints: the looks are at checkpoints of one run. runs: each is the end of a run of its own, whose learning
    # rate has come down.
    looks_at: Literal["checkpoints", "runs"] = "runs"
    tokenizer: StageConfig = field(default_factory=StageConfig)
    decoder: StageConfig = field(default_factory=StageConfig)
    # Options of tools/extract_latents.py besides the places, such as --data data/emoji --label group.
    latents: str | None = None
    dit: StageConfig = field(default_factory=StageConfig)
    seeds: tuple[int, ...] = (0,)  # of the DiT and of what it draws
    measures: MeasureConfig = field(default_factory=MeasureConfig)
    curves: CurveConfig = field(default_factory=CurveConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML file. UserError: a key, a name or a rule between keys is wrong."""
    study = load_config(path, StudyConfig, overrides)
    _need(study.tokenizer.recipe is not None, "tokenizer.recipe: name the recipe of pre-training")
    _need(bool(study.looks), "looks: name the steps at which a tokenizer is looked at, such as [100, 200, 400]")
    _need(
        min(study.looks) > 0 and sorted(set(study.looks)) == list(study.looks),
        f"looks = {list(study.looks)}: must be whole numbers above 0, each larger than the one before",
    )
    _need(bool(study.seeds), "seeds: name one at least")
    _need(
        min(study.seeds) >= 0 and len(set(study.seeds)) == len(study.seeds),
        f"seeds = {list(study.seeds)}: must be whole numbers from 0 on, each once",
    )
    for measure in ("generation", "samples"):
        _need(
            getattr(study.measures, measure) is None or study.dit.recipe is not None,
            f"measures.{measure} needs a DiT: name dit.recipe, or leave the measure out",
        )
    _need(
        study.measures.tokenizer is not None or study.measures.generation is not None,
        "measures: the study measures nothing; give measures.tokenizer or measures.generation",
    )
    words(study, "slurm.options")
    for name, own in _OWN_OPTIONS.items():
        for word in words(study, name):
            option = word.partition("=")[0]
            known = next((one for one in own if len(option) > 2 and one.startswith(option)), None)
            _need(known is None, f"{name}: {known} is set by the study itself; leave {word} out")
    for name, example in (("launcher", "deepspeed"), ("slurm.launcher", "srun python -u")):
        _need(bool(words(study, name)), f"{name}: name what starts the processes, such as {example}")
    for kind in study.slurm.by_kind:
        _need(kind in KINDS, f"slurm.by_kind.{kind}: no link is of this kind; use {', '.join(KINDS)}")
        words(study, f"slurm.by_kind.{kind}")
    _need(
        study.dit.recipe is None or "--data" in words(study, "latents"),
        "latents: the DiT needs a data set; give the options of tools/extract_latents.py, such as --data data/emoji",
    )
    _check_axes(study)
    _check_curves(study)
    return study


def keep_study(study: StudyConfig) -> None:
    """Write a study into its folder, for its jobs and for the report."""
    write_atomic(Path(study.output_dir) / STUDY, to_yaml(study).encode())


def words(study: StudyConfig, name: str) -> list[str]:
    """Return the words of a key that holds a part of a command line."""
    value: Any = study
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
    try:
        return shlex.split(str(value or ""))
    except ValueError as error:
        raise UserError(f"{name} = {value}: is no command line ({error}); close its quotes") from None


def _check_axes(study: StudyConfig) -> None:
    for axis, choices in study.axes.items():
        for name in (axis, *choices):
            _need(
                bool(_NAME.fullmatch(name)),
                f"axes.{axis}: the name {name!r} becomes a folder's: use letters, digits, ., _, + and -",
            )
        _need(axis not in COLUMNS, f"axes.{axis}: the table of results has a column of this name; choose another one")
        for choice, stages in choices.items():
            for stage in stages:
                _need(
                    stage in STAGES,
                    f"axes.{axis}.{choice}.{stage}: no stage has this name; use {', '.join(STAGES)}",
                )
                _need(
                    getattr(study, stage).recipe is not None,
                    f"axes.{axis}.{choice}.{stage}: the study has no {stage}; name {stage}.recipe",
                )
        _need(
            any(any(stages.values()) for stages in choices.values()),
            f"axes.{axis}: no choice sets anything; give one a setting, or leave the axis out",
        )


def _check_curves(study: StudyConfig) -> None:
    x = study.curves.x
    _need(
        x in ("flops", "samples") or x in study.axes,
        f"curves.x = {x}: must be flops, samples or an axis ({', '.join(study.axes) or 'there is none'})",
    )
    repeats = study.curves.repeats
    _need(
        repeats is None or repeats in study.axes and repeats != x,
        f"curves.repeats = {repeats}: must be an axis other than curves.x ({', '.join(study.axes) or 'there is none'})",
    )
    _need(
        study.curves.baseline is None or len(baseline_axes(study)) == 1,
        f"curves.baseline = {study.curves.baseline}: must be a choice on one axis, other than curves.x and "
        "curves.repeats",
    )
    for choice in study.axes.get(x, {}):
        _need(number(choice) > 0, f"curves.x = {x}: its choice {choice!r} is no number above 0")
    _need(study.curves.held_out >= 0, f"curves.held_out = {study.curves.held_out}: must be at least 0")
    rate = study.cost.flops_per_second
    _need(rate is None or rate > 0, f"cost.flops_per_second = {rate}: must be above 0")


def baseline_axes(study: StudyConfig) -> list[str]:
    """Return the axes of lines that have the baseline among their choices."""
    no_lines = (study.curves.x, study.curves.repeats)
    return [axis for axis, choices in study.axes.items() if study.curves.baseline in choices and axis not in no_lines]


def number(text: str) -> float:
    """Return the number that a choice stands for; 0 if it stands for none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
