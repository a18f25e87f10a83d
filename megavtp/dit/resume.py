"""This checks whether a run can continue a DiT's checkpoint, beyond the names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import fields

from megavtp.checkpoint.store import Checkpoint
from megavtp.dit.checkpoint import read_facts
from megavtp.dit.config import CompleteDiT, DiTModelConfig
from megavtp.errors import UserError
from megavtp.latents.artifact import check_same_tokenizer
from megavtp.latents.folder import LatentFolder

# With other values the same weights would mean something else, or some would be left out. Only the name of the size may
# change, and the side of the latents, as positions are not learnt.
_IDENTITY = tuple(f.name for f in fields(DiTModelConfig) if f.name not in ("size", "latent_size"))


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
