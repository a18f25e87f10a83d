"""This reads the DiT of a native checkpoint, without engine or optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.kind import FACTS, is_dit
from megavtp.checkpoint.store import Checkpoint, open_checkpoint
from megavtp.config.sizes import known
from megavtp.dit.config import CompleteDiT, CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.model.build import build_dit, load_full_dit
from megavtp.dit.model.model import DiT
from megavtp.dit.validate import check_dit_model
from megavtp.errors import UserError
from megavtp.json_file import form
from megavtp.latents.artifact import TokenizerArtifact
from megavtp.models.fitting import check

AVERAGE, TRAINED = "model/ema.", "model/dit."  # prefixes of LightningDiT's keys


@form
class _Facts:
    visual_tokenizer: dict[str, Any] | None
    classes: list[str] | None


@dataclass(frozen=True)
class StoredDiT:
    """A DiT to sample from.

    Attributes:
        artifact: the tokenizer whose latents it makes, with the statistics that undo their normalisation; None if it
            is not known, as with weights from elsewhere.
        classes: names by label of the classes it was trained on; None if unknown. The model may have room for more.
    """

    model: DiT
    config: CompleteDiTConfig
    artifact: TokenizerArtifact | None
    classes: list[str] | None
    step: int

    @property
    def trained_classes(self) -> int:
        """The number of labels that a class-conditioned DiT was trained on, as far as is known."""
        return len(self.classes) if self.classes else known(self.config.model.num_classes, "model.num_classes")

    def class_name(self, label: int) -> str:
        return self.classes[label] if self.classes and label < len(self.classes) else f"class {label}"


def artifact_of(checkpoint: Checkpoint) -> TokenizerArtifact | None:
    """Return the tokenizer of the latents that a DiT was trained on, None if unknown. UserError if there is no DiT."""
    if not is_dit(checkpoint):
        raise UserError(f"{checkpoint.path} holds no DiT; give a checkpoint of launchers/train_dit.py")
    values = _facts(checkpoint).visual_tokenizer
    return None if values is None else TokenizerArtifact.from_dict(values, str(checkpoint.path))


def classes_of(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of the classes that a DiT was trained on, None if unknown."""
    return _facts(checkpoint).classes


def dit_config(checkpoint: Checkpoint) -> CompleteDiTConfig:
    """Return the configuration of a DiT's run, with all sizes of the model. Raises UserError."""
    config = checkpoint.config(DiTConfig, lambda config: replace(config, model=check_dit_model(config.model)))
    given = "num_classes" if config.model.condition == "class" else "caption_width"
    for name in ("latent_size", "latent_channels", given):
        if getattr(config.model, name) is None:
            raise UserError(f"{checkpoint.path}: its configuration lacks model.{name}; use another checkpoint")
    return complete_config(config)


def dit_tensors(checkpoint: Checkpoint, config: CompleteDiT, prefix: str) -> dict[str, Tensor]:
    """Return a DiT's averaged or trained weights, by LightningDiT's keys. UserError unless they are all those of
    ``config``, so that a model built from it takes no more memory than the file."""
    names = [name for name in checkpoint.names if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): checkpoint.tensor(name) for name in names}
    with torch.device("meta"):
        model = DiT(config)
    check(tensors, {name: list(p.shape) for name, p in model.named_parameters()}, str(checkpoint.path))
    return tensors


def _facts(checkpoint: Checkpoint) -> _Facts:
    return checkpoint.fact(FACTS, _Facts)


def load_dit(path: str | Path, device: torch.device | str = "cpu", *, average: bool = True) -> StoredDiT:
    """Load the whole DiT from a checkpoint of any layout, in float32, with its averaged weights or the trained ones.

    Raises:
        UserError: the checkpoint is missing or corrupt, or holds no DiT that fits its config.
    """
    with open_checkpoint(path) as checkpoint:
        artifact = artifact_of(checkpoint)
        config = dit_config(checkpoint)
        tensors = dit_tensors(checkpoint, config.model, AVERAGE if average else TRAINED)
        classes = classes_of(checkpoint)
        room = config.model.num_classes  # None of a DiT that is conditioned on captions
        if classes is not None and room is not None and len(classes) > room:
            raise UserError(f"{checkpoint.path} names more classes than its DiT has; use another checkpoint")
        model = build_dit(config.model, device=device, attention=config.parallel.attention)
        load_full_dit(model, tensors)
        return StoredDiT(model.eval(), config, artifact, classes, checkpoint.step)
