"""The DiT of a native checkpoint, without engine or optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megavtp.checkpoint.store import Checkpoint, open_checkpoint
from megavtp.config.load import from_dict
from megavtp.config.sizes import known
from megavtp.dit.config import CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.model.build import build_dit, load_full_dit
from megavtp.dit.model.model import DiT
from megavtp.errors import UserError
from megavtp.latents.artifact import TokenizerArtifact

FACTS = "dit"  # of the checkpoint's meta data: {"visual_tokenizer": ..., "classes": names or None}
AVERAGE, TRAINED = "model/ema.", "model/dit."  # what comes before LightningDiT's keys


@dataclass(frozen=True)
class StoredDiT:
    """A DiT to sample from.

    Attributes:
        artifact: the tokenizer whose latents it makes, with the statistics that undo their normalisation; None if that
            is not known, of weights that came from elsewhere.
        classes: names by label, of those it was trained on; None if unknown. The model may have room for more.
    """

    model: DiT
    config: CompleteDiTConfig
    artifact: TokenizerArtifact | None
    classes: list[str] | None
    step: int

    @property
    def trained_classes(self) -> int:
        """Labels that it was trained on, as far as is known: of a class-conditioned DiT."""
        return len(self.classes) if self.classes else known(self.config.model.num_classes, "model.num_classes")

    def class_name(self, label: int) -> str:
        return self.classes[label] if self.classes and label < len(self.classes) else f"class {label}"


def is_dit(checkpoint: Checkpoint) -> bool:
    return FACTS in checkpoint.meta


def artifact_of(checkpoint: Checkpoint) -> TokenizerArtifact | None:
    """The tokenizer of the latents it was trained on, None if unknown. UserError if it holds no DiT."""
    if not is_dit(checkpoint):
        raise UserError(f"{checkpoint.path} holds no DiT; give a checkpoint of launchers/train_dit.py")
    values = checkpoint.meta[FACTS]["visual_tokenizer"]
    return None if values is None else TokenizerArtifact.from_dict(values, str(checkpoint.path))


def load_dit(path: str | Path, device: torch.device | str = "cpu", *, average: bool = True) -> StoredDiT:
    """The whole DiT of a checkpoint of any layout, in float32: its averaged weights, or the trained ones.

    Raises:
        UserError: the checkpoint is missing, corrupt, or holds no DiT of its config.
    """
    with open_checkpoint(path) as checkpoint:
        artifact = artifact_of(checkpoint)
        config = complete_config(from_dict(checkpoint.meta["config"], DiTConfig))
        model = build_dit(config.model, device=device, attention=config.parallel.attention)
        prefix = AVERAGE if average else TRAINED
        names = [name for name in checkpoint.names if name.startswith(prefix)]
        load_full_dit(model, {name.removeprefix(prefix): checkpoint.tensor(name) for name in names})
        return StoredDiT(model.eval(), config, artifact, checkpoint.meta[FACTS]["classes"], checkpoint.step)
