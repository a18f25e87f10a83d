"""What a link's folder says about it: begun, failed or finished, with which settings, and in which time."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megavtp.data.files import write_json
from megavtp.errors import UserError
from megavtp.json_file import form, read_json
from megavtp.study.links import Link
from megavtp.training.output_dir import writing

RECORD = "link.json"
State = Literal["begun", "failed", "finished"]


@form
class Record:
    """``seconds`` counts the starts that ended by themselves; ``whole`` says that the first one was the only one."""

    version: Literal[1]
    command: str
    settings: dict[str, Any]
    state: State
    exit: int | None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    whole: bool


def read_record(link: Link) -> Record | None:
    """Return the record in a link's folder; None if it was never begun. UserError: it is damaged."""
    path = link.folder / RECORD
    return read_json(path, Record, f"remove {link.folder}, to have it made anew") if path.exists() else None


def write_record(link: Link, record: Record) -> None:
    """Write a link's record. UserError: it cannot be written."""
    with writing(link.folder / RECORD):
        write_json(link.folder / RECORD, vars(record), indent=1)


def is_finished(link: Link, record: Record | None) -> bool:
    """Whether a link has run to its end, and its outputs are still there."""
    return record is not None and record.state == "finished" and all(path.exists() for path in link.outputs)


def check_unchanged(link: Link, record: Record | None) -> None:
    """Raise UserError if a link was begun with other settings than the study has now."""
    if record is None:
        return
    now = json.loads(json.dumps(dict(link.settings)))
    for key in sorted(now.keys() | record.settings.keys()):
        old, new = record.settings.get(key), now.get(key)
        if old != new or (key in now) != (key in record.settings):
            raise UserError(
                f"{link.folder} was begun with {_changed(key, old, new)}; set another output_dir, or remove that "
                "folder and what was made from it"
            )


def check_links(links: Sequence[Link]) -> None:
    """Raise UserError if what a study has begun of its ``links``, in the order in which they run, does not fit to them
    or to each other."""
    records = {link.folder: read_record(link) for link in links}
    gone: dict[Path, Link] = {}  # by the folder of each link that was made from another, the one that is not there
    for link in links:
        check_unchanged(link, records[link.folder])
        _check_obtainable(link, records[link.folder])
        for part in link.after:
            if part.folder in gone or records[part.folder] is None:
                gone.setdefault(link.folder, gone.get(part.folder, part))
    if stale := [link for link in links if link.folder in gone and records[link.folder] is not None]:
        raise UserError(
            f"{gone[stale[0].folder].folder} is not there any more, but what was made from it is; remove it, too: "
            f"{', '.join(str(link.folder) for link in stale)}"
        )


def _check_obtainable(link: Link, record: Record | None) -> None:
    """Raise UserError if a training has gone past a checkpoint that it did not keep."""
    for path in link.outputs if record is not None and link.resumes else ():
        later = [other for other in path.parent.glob("step-*") if other.name > path.name]
        if later and not path.exists():
            raise UserError(
                f"{path} was not kept by this training, which is past it; take that step out of looks, or set another "
                "output_dir"
            )


def _changed(key: str, old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list) and key == "arguments":
        old, new = ([word for word in words if words.count(word) > other.count(word)] for words, other in
                    ((old, new), (new, old)))
        return f"the options {' '.join(old) or 'of before'}, and not {' '.join(new) or 'in this order'}"
    return f"{key} = {json.dumps(old)}, not {json.dumps(new)}"


def read_metrics(link: Link) -> Mapping[str, float]:
    """Return the metrics of a finished measure, by name such as "generation/gfid"; what is null is left out."""
    remedy = f"remove {link.folder}, to have it measured again"
    found = read_json(link.outputs[0], dict[str, Any], remedy).get("metrics")
    if not isinstance(found, Mapping):
        raise UserError(f"{link.outputs[0]} holds no metrics; {remedy}")
    return {name: float(value) for name, value in found.items() if "/" in name and isinstance(value, (int, float))}


def _last_words(log: Path) -> str:
    """Return the last line of a log that says something, up to 300 characters; "" if there is none. What srun says of
    the statuses of its tasks says nothing."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line and not line.startswith("srun: ")), "")[:300]
    return ""


def failure(link: Link) -> str:
    """Return what is known of a link that failed: its kind and folder, the exit status, its last words and its log."""
    record = read_record(link)
    status = f"exit status {record.exit}" if record else "not begun"
    said = _last_words(link.log)
    return f"{link.kind} in {link.folder} ({status}{f': {said}' if said else ''}); its log is {link.log}"
