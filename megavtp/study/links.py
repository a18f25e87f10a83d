"""The links of a study's cells: each is one command with a folder of its own, and may serve several cells."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megavtp.config.load import to_dict

ROOT = Path(__file__).resolve().parents[2]
# In the order of a chain.
Kind = Literal["pretrain", "decoder", "convert", "evaluate", "latents", "dit", "generate", "draw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Keys that change no result, so that a link may go on with other values of them.
_FREE = (
    "parallel.", "telemetry.", "deepspeed.", "data.workers", "data.prefetch", "train.checkpoint_every",
    "train.keep_last", "train.resume", "train.max_skipped_steps",
)
_SCRIPTS: dict[Kind, str] = {
    "pretrain": "launchers/pretrain.py", "decoder": "launchers/train_decoder.py",
    "convert": "tools/convert_checkpoint.py", "evaluate": "tools/evaluate.py", "latents": "tools/extract_latents.py",
    "dit": "launchers/train_dit.py", "generate": "tools/evaluate.py",
    "draw": "tools/sample.py",
}


@dataclass(frozen=True)
class Link:
    """One command of a chain.

    Attributes:
        folder: holds its record, its log and its outputs.
        arguments: of the kind's script.
        outputs: what exists once it has finished.
        settings: what decides its result, by dotted names.
        after: the links that have to be finished before.
        flops: of a training, over all devices; 0 for other kinds.
    """

    kind: Kind
    folder: Path
    arguments: tuple[str, ...]
    outputs: tuple[Path, ...]
    settings: Mapping[str, Any]
    after: "tuple[Link, ...]" = ()
    flops: float = 0.0

    @property
    def script(self) -> str:
        return _SCRIPTS[self.kind]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def wants_new_place(self) -> bool:
        """Whether the command refuses outputs that a broken one left behind, as it does not resume."""
        return self.kind == "convert"

    @property
    def resumes(self) -> bool:
        """Whether the command goes on from the state that a broken one saved."""
        return self.flops > 0

    def command(self, launcher: list[str]) -> list[str]:
        """Return the command line; a conversion runs in a single process, without the launcher."""
        words = ["python"] if self.kind == "convert" else launcher
        first, *rest = [sys.executable if word == "python" else word for word in words]
        own = Path(sys.executable).parent / first  # of the environment that runs this
        return [str(own) if own.exists() else first, *rest, str(ROOT / self.script), *self.arguments]

    def shown(self, launcher: list[str]) -> str:
        """Return the command as one would type it in the repository."""
        return shlex.join([*(["python"] if self.kind == "convert" else launcher), self.script, *self.arguments])


def settings_of(config: Any) -> dict[str, Any]:
    """Return the settings of a run that its results depend on, by dotted names."""
    flat = _flat(to_dict(config), "")
    return {key: value for key, value in flat.items() if not key.startswith(_FREE) and not key.endswith("micro_batch")}


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
