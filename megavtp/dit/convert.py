"""This converts a DiT's checkpoint between the native format and LightningDiT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megavtp.checkpoint.formats.convert import WEIGHTS_ONLY, Format, check_fitting, write_native
from megavtp.checkpoint.kind import FACTS
from megavtp.checkpoint.reading import is_checkpoint, open_checkpoint
from megavtp.config.sizes import narrowed
from megavtp.data.new_path import new_path
from megavtp.data.torch_file import write_torch_file
from megavtp.dit.checkpoint import AVERAGE, TRAINED, artifact_of, dit_config, dit_tensors
from megavtp.dit.config import CompleteDiTConfig, DiTConfig
from megavtp.dit.lightningdit import LightningDiT, lightningdit_tree, read_lightningdit
from megavtp.latents.artifact import TokenizerArtifact, check_same_tokenizer


def convert_dit(
    path: str | Path, to: Format, out: str | Path, tokenizer: str | Path | None = None, module_prefix: bool = False
) -> list[str]:
    """Write the DiT at ``path`` as a native checkpoint or as LightningDiT's ``.pt``. The latter is ``out`` itself, or a
    file in the folder ``out`` with LightningDiT's name for the step.

    Args:
        tokenizer: folder of the tokenizer or of the latents that the DiT belongs to, with ``visual_tokenizer.json``.
            Without it, a native DiT made from a ``.pt`` does not know its tokenizer. A DiT that knows its tokenizer
            accepts no other.
        module_prefix: see ``lightningdit_tree``.
    """
    path, out = Path(path), Path(out)
    dit = _read_native_dit(path) if path.is_dir() or is_checkpoint(path) else read_lightningdit(path)
    notes = list(dit.notes)
    if tokenizer is not None:
        artifact = TokenizerArtifact.read(tokenizer)
        check_fitting(artifact.needed_statistics(str(tokenizer)), dit.config.latent_channels, str(tokenizer))
        if dit.artifact is not None:
            check_same_tokenizer(dit.artifact, str(path), artifact, str(tokenizer))
        dit = replace(dit, artifact=artifact)
    if to == "native":
        if dit.artifact is None:
            notes.append("which tokenizer it belongs to is not known: name its folder with --tokenizer to state it")
        with new_path(out) as folder:
            _save_native_dit(folder, dit)
        return [*notes, WEIGHTS_ONLY]
    tree = lightningdit_tree(dit.config, dit.weights, dit.average, module_prefix=module_prefix)
    with new_path(out) as new:
        file = new
        if out.suffix != ".pt":
            new.mkdir()
            file = new / f"{dit.step:07d}.pt"
        write_torch_file(file, tree)
    return notes


def _read_native_dit(path: Path) -> LightningDiT:
    with open_checkpoint(path) as checkpoint:
        artifact = artifact_of(checkpoint)  # this comes first, as it tells if there is no DiT
        config = dit_config(checkpoint)
        weights, average = (dit_tensors(checkpoint, config.model, prefix) for prefix in (TRAINED, AVERAGE))
        facts = checkpoint.fact(FACTS, dict[str, Any])
        return LightningDiT(config.model, weights, average, checkpoint.step, [], artifact, config, facts)


def _save_native_dit(folder: Path, dit: LightningDiT) -> None:
    tensors = {
        f"{prefix}{name}": tensor
        for prefix, state in ((TRAINED, dit.weights), (AVERAGE, dit.average)) for name, tensor in state.items()
    }
    config = narrowed(dit.run or DiTConfig(), CompleteDiTConfig, model=dit.config)
    artifact = dit.artifact.to_dict() if dit.artifact else None
    facts = {"classes": None, **(dit.facts or {}), "visual_tokenizer": artifact}
    write_native(folder, dit.step, tensors, config, {FACTS: facts})
