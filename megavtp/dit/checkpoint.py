"""This reads the DiT of a native checkpoint, without engine or optimizer, and tells whether a run can continue it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.kind import FACTS, is_dit
from megavtp.checkpoint.store import Checkpoint, open_checkpoint
from megavtp.config.sizes import known
from megavtp.dit.config import CompleteDiT, CompleteDiTConfig, DiTConfig, DiTModelConfig, complete_config
from megavtp.dit.model.build import build_dit
from megavtp.dit.model.model import DiT
from megavtp.dit.validate import check_dit_model
from megavtp.errors import UserError
from megavtp.json_file import form
from megavtp.latents.artifact import TokenizerArtifact, check_same_tokenizer
from megavtp.latents.folder import LatentFolder
from megavtp.models.fitting import check, load_whole

AVERAGE, TRAINED = "model/ema.", "model/dit."  # prefixes of LightningDiT's keys
# With other values the same weights would mean something else, or some would be left out. Only the name of the size may
# change, and the side of the latents, as positions are not learnt.
_IDENTITY = tuple(f.name for f in fields(DiTModelConfig) if f.name not in ("size", "latent_size"))


@form
class _Facts:
    visual_tokenizer: dict[str, Any] | None
    classes: list[str] | None


@dataclass(frozen=True)
class DiTFacts:
    """What is known of a DiT besides its weights.

    Attributes:
        config: the configuration of its run, with all sizes of the model.
        artifact: the tokenizer whose latents it makes, with the statistics that undo their normalisation; None if it
            is not known, as with weights from elsewhere.
        classes: names by label of the classes it was trained on; None if unknown. The model may have room for more.
    """

    config: CompleteDiTConfig
    step: int
    artifact: TokenizerArtifact | None = None
    classes: list[str] | None = None


@dataclass(frozen=True)
class StoredDiT(DiTFacts):
    """A DiT to sample from."""

    model: DiT = field(kw_only=True)

    @property
    def trained_classes(self) -> int:
        """The number of labels that a class-conditioned DiT was trained on, as far as is known."""
        return len(self.classes) if self.classes else known(self.config.model.num_classes, "model.num_classes")

    @property
    def class_values(self) -> Sequence[str | int]:
        """What a data set's metadata say of each class, in the order of the labels: its name, or its number."""
        return self.classes or range(self.trained_classes)

    def class_name(self, label: int) -> str:
        return self.classes[label] if self.classes and label < len(self.classes) else f"class {label}"


@dataclass(frozen=True)
class WholeDiT(DiTFacts):
    """A DiT with both sets of weights, as it is converted.

    Attributes:
        weights, average: trained parameters and their moving average, by LightningDiT's keys without prefixes; they
            have no position tables.
        notes: messages for the user.
    """

    weights: dict[str, Tensor] = field(kw_only=True)
    average: dict[str, Tensor] = field(kw_only=True)
    notes: list[str] = field(kw_only=True)


def stored_facts(artifact: TokenizerArtifact | None, classes: list[str] | None) -> dict[str, Any]:
    """Return what a DiT's checkpoint states besides weights and configuration."""
    return {FACTS: {"visual_tokenizer": artifact and artifact.to_dict(), "classes": classes}}


def read_facts(checkpoint: Checkpoint) -> DiTFacts:
    """Read what a checkpoint states of its DiT. UserError if it holds none, or lacks a size of the model."""
    if not is_dit(checkpoint):
        raise UserError(f"{checkpoint.path} holds no DiT; give a checkpoint of launchers/train_dit.py")
    facts = checkpoint.fact(FACTS, _Facts)
    tokenizer = facts.visual_tokenizer
    artifact = None if tokenizer is None else TokenizerArtifact.from_dict(tokenizer, str(checkpoint.path))
    config = checkpoint.config(DiTConfig, lambda config: replace(config, model=check_dit_model(config.model)))
    given = "num_classes" if config.model.condition == "class" else "caption_width"
    for name in ("latent_size", "latent_channels", given):
        if getattr(config.model, name) is None:
            raise UserError(f"{checkpoint.path}: its configuration lacks model.{name}; use another checkpoint")
    return DiTFacts(complete_config(config), checkpoint.step, artifact, facts.classes)


def dit_tensors(checkpoint: Checkpoint, config: CompleteDiT, prefix: str) -> dict[str, Tensor]:
    """Return a DiT's averaged or trained weights, by LightningDiT's keys. UserError unless they are all those of
    ``config``, so that a model built from it takes no more memory than the file."""
    names = [name for name in checkpoint.names if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): checkpoint.tensor(name) for name in names}
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in DiT(config).named_parameters()}
    check(tensors, shapes, str(checkpoint.path))
    return tensors


def load_dit(
    path: str | Path, device: torch.device | str = "cpu", *, average: bool = True, opened: Checkpoint | None = None
) -> StoredDiT:
    """Load the whole DiT from a checkpoint of any layout, in float32, with its averaged weights or the trained ones.

    ``opened`` is the checkpoint if it is open already; it stays open.

    Raises:
        UserError: the checkpoint is missing or corrupt, or holds no DiT that fits its config.
    """
    with nullcontext(opened) if opened is not None else open_checkpoint(path) as checkpoint:
        facts = read_facts(checkpoint)
        config, classes = facts.config, facts.classes
        tensors = dit_tensors(checkpoint, config.model, AVERAGE if average else TRAINED)
        room = config.model.num_classes  # None of a DiT that is conditioned on captions
        if classes is not None and room is not None and len(classes) > room:
            raise UserError(f"{checkpoint.path} names more classes than its DiT has; use another checkpoint")
        model = build_dit(config.model, device=device, attention=config.parallel.attention)
        load_whole(model, tensors, model.mesh, tensors)
        return StoredDiT(**vars(facts), model=model.eval())


def check_goes_on(checkpoint: Checkpoint, model: CompleteDiT, folder: LatentFolder) -> None:
    """Compare a run's ``model`` and latents with those that the checkpoint was trained with.

    Raises:
        UserError: it was trained on another tokenizer's latents, on latents normalised by other statistics, on other
            classes, or as another model.
    """
    where, latents = str(checkpoint.path), str(folder.folder)
    before = read_facts(checkpoint)
    if before.artifact is not None:
        check_same_tokenizer(before.artifact, where, folder.artifact, latents)
    for name in _IDENTITY:
        own, trained = getattr(model, name), getattr(before.config.model, name)
        if own != trained:
            raise UserError(
                f"{where} has model.{name} = {trained}, this run {own}: set model.{name}={trained}, or another "
                "output_dir"
            )
    if model.condition == "class" and before.classes is not None and before.classes != folder.classes:
        raise UserError(
            f"{where} was trained on other classes ({_some(before.classes)}) than those of {latents} "
            f"({_some(folder.classes)}): extract the latents with the same --label, or set another output_dir"
        )


def _some(names: list[str] | None) -> str:
    return "numbers without names" if names is None else ", ".join(names[:5]) + ", ..." * (len(names) > 5)
