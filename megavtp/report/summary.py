"""What was run, how it went, and how to make it again, in words."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavtp.config.load import to_dict
from megavtp.config.run import ParallelConfig
from megavtp.config.schema import Config
from megavtp.dit.config import DiTConfig
from megavtp.report.folder import CONFIG_FILE, KINDS, Kind, Run
from megavtp.training.progress import duration
from megavtp.training.state import flat

NOT_RECORDED = "not recorded"
LAUNCHERS: dict[Kind, str] = {
    "pretrain": "launchers/pretrain.py", "decoder": "launchers/train_decoder.py", "dit": "launchers/train_dit.py",
}
_DEFAULTS: dict[Kind, Any] = {"pretrain": Config, "decoder": Config, "dit": DiTConfig}
_MOST_NAMES = 8  # of samples or keys in a warning


@dataclass(frozen=True)
class Setting:
    """A key of the configuration with its default and each run's value, as text; None where a run lacks the key."""

    key: str
    default: str | None
    values: Sequence[str | None]


def state(run: Run) -> tuple[str, str]:
    """Return a word for how far a run has come, which is also its class in the page, and a text."""
    total = f" of {run.total:,}" if run.total is not None else ""
    if run.events_of("finished"):
        return "finished", f"finished, {run.done:,} steps"
    if run.total is not None and run.done >= run.total:
        return "finished", f"all {run.total:,} steps done"
    if run.events and run.events[-1]["kind"] == "stopped_by_signal":
        return "stopped", f"stopped after step {run.done:,}{total}"
    return ("going", f"step {run.done:,}{total}") if run.done else ("waiting", f"no step{total} done yet")


def facts(run: Run) -> dict[str, str]:
    """Return the facts about a run by their names."""
    settings, start = run.settings, _start(run)
    layout, machine, versions = (_mapping(start.get(part)) for part in ("layout", "machine", "versions"))
    found = {"Trains": KINDS[run.kind]}
    batch = settings.get("train.batch_size")
    if isinstance(batch, int):
        found["Batch"] = f"{batch:,} a step" + (f", {run.done * batch:,} samples seen" if run.done else "")
    found["Layout"] = _layout(settings, layout)
    found["Precision"] = str(settings.get("parallel.precision", NOT_RECORDED))
    found["Training time"] = _time(run)
    found["Data"] = str(settings.get("data.root", NOT_RECORDED))
    if start:
        found["Command"] = str(start.get("command", NOT_RECORDED))
        found["Machine"] = _machine(layout, machine) if machine else NOT_RECORDED
        found["Code"] = _code(versions) if versions else NOT_RECORDED
    else:
        found["Command, machine, code"] = NOT_RECORDED
    return found


def _start(run: Run) -> Mapping[str, Any]:
    """Return the event of the last start, as the run went on from there; empty for a run that recorded none."""
    return next(iter(reversed(run.events_of("started"))), {})


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _layout(settings: Mapping[str, Any], layout: Mapping[str, Any]) -> str:
    sizes = [f"{name} {settings.get(f'parallel.{name}', '?')}" for name in ("tp", "pp")]
    sizes += [f"dp {layout['dp']}"] if "dp" in layout else []
    stage = settings.get("parallel.zero_stage", "?")
    if stage == "auto" and isinstance(dp := layout.get("dp"), int):
        stage = ParallelConfig(zero_stage="auto").zero_on(dp)
    sizes.append(f"ZeRO {stage}")
    return ", ".join(sizes)


def _machine(layout: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    devices = machine.get("devices")
    device = f"{devices} x {machine.get('device')}, " if devices else ""
    several = f"{layout.get('machines')} machines" if layout.get("machines") != 1 else "one machine"
    where = f"{layout.get('processes')} processes on {several}" if layout.get("processes") != 1 else "one process"
    return f"{where}; {machine.get('host')}: {device}{machine.get('cores')} CPU cores, {machine.get('memory_gib')} GiB"


def _code(versions: Mapping[str, Any]) -> str:
    commit = f", commit {versions['commit']}" if versions.get("commit") else ""
    others = [f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if versions.get(name)]
    return f"megavtp {versions.get('megavtp')}{commit}, source {versions.get('source')}; {', '.join(others)}"


def _time(run: Run) -> str:
    """Return the time of all steps, without evaluations and saves."""
    seconds, before = 0.0, 0
    for line in run.steps:
        seconds += (line.seconds_per_step or 0.0) * max(0, line.step - before)
        before = max(before, line.step)
    if not 0 < seconds < math.inf:
        return NOT_RECORDED
    return f"{duration(seconds)}, {seconds / before:.3g} s a step"


def warnings(run: Run) -> list[str]:
    """Return a line for each thing that went wrong in a run, and for each that its folder should hold and does not."""
    found = []
    for event in run.events_of("data_changed"):
        keys = _few(event.get("keys"))
        found.append(f"After step {event['step']:,} the run went on with other data, as these changed: {keys}")
    skipped = run.events_of("skipped")
    if skipped:
        steps = _few([f"{event['step']:,} ({_few(event.get('terms'))})" for event in skipped])
        found.append(
            f"{_count(len(skipped), 'step')} skipped, as a loss term or the gradient was not finite: step {steps}; "
            f"the same command with {skipped[0].get('replay')} shows where it comes from"
        )
    warned: dict[str, str] = {}  # by term: each start of a run may warn of it anew
    for event in run.events_of("warning"):
        line = f"At step {event['step']:,} {event.get('message')}; {event.get('remedy')}"
        warned.setdefault(str(event.get("term")), line)
    found += warned.values()
    if nonfinite := sum(line.nonfinite_steps for line in run.steps):
        found.append(f"{_count(nonfinite, 'step')} left out of the means, as a number in them was not finite")
    if bad := sum(line.bad_samples for line in run.steps):
        found.append(f"{_count(bad, 'bad sample')} replaced by others; tools/prepare_data.py check names them")
    sources = {str(_mapping(event.get("versions")).get("source")): event["step"] for event in run.events_of("started")}
    if len(sources) > 1:
        told = _few([f"{source} (last started at step {step:,})" for source, step in sources.items()])
        found.append(f"Different code was at work; its source was {told}")
    if resumed := run.events_of("resumed"):
        steps = _few([f"{event['step']:,}" for event in resumed])
        found.append(f"Started again {_times(len(resumed))}, from the checkpoint of step {steps}")
    return found + list(run.left_out)


def notes(run: Run, shown: Sequence[Run]) -> list[str]:
    """Return what the run noted when it started, such as where its first weights come from, and the runs in its folder
    that are not ``shown``."""
    found = [f"At step {event['step']:,}: {event.get('note')}" for event in run.events if "note" in event]
    here = {other.path.resolve() for other in shown}
    inside = sorted(path.parent for path in run.path.glob(f"*/{CONFIG_FILE}") if path.parent.resolve() not in here)
    return found + [f"{folder} holds a run of its own, which is not shown" for folder in inside]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun} was" if number == 1 else f"{number:,} {noun}s were"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _few(names: Any) -> str:
    names = [str(name) for name in names] if isinstance(names, (list, tuple)) else [str(names)]
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def settings_of(runs: Sequence[Run]) -> list[Setting]:
    """Return the settings of runs of one kind in which a run differs from the defaults, or the runs from each other."""
    defaults = flat(to_dict(_DEFAULTS[runs[0].kind]()))
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [
        Setting(key, _text(defaults, key), [_text(run.settings, key) for run in runs])
        for key in keys if key != "output_dir"
    ]
    return [setting for setting in found if {*setting.values} != {setting.default}]


def differing(settings: Sequence[Setting]) -> list[Setting]:
    """Return those of the settings in which the runs differ from each other."""
    return [setting for setting in settings if len({*setting.values}) > 1]


def _text(settings: Mapping[str, Any], key: str) -> str | None:
    if key not in settings:
        return None
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def commands(run: Run) -> list[tuple[str, str]]:
    """Return (what for, command line) of what makes a run again."""
    start = _start(run)
    layout = _mapping(start.get("layout"))
    processes = layout.get("processes")
    number = f"--num_accelerators {processes} " if isinstance(processes, int) else ""
    path, again = str(run.path), f"{run.path}_again"
    words = shlex.join([LAUNCHERS[run.kind], "--config", str(Path(path) / CONFIG_FILE), f"output_dir={again}"])
    found = [("From the configuration that ran, into a folder of its own", f"deepspeed {number}{words}")]
    if start.get("command"):
        how = layout.get("launcher")
        found.append((f"As it was started{f' (launcher: {how})' if how else ''}", str(start["command"])))
    return found


def report_command(runs: Sequence[Run]) -> str:
    """Return the command line that makes this page."""
    return shlex.join(["python", "tools/report.py", *(str(run.path) for run in runs), "--out", "report.html"])
