"""Checkpoints from one form into another: a tokenizer's, a DiT's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from megavtp import __version__
from megavtp.checkpoint.formats.hf_vtp import PERIODS, save_folder
from megavtp.checkpoint.formats.vtp_source import VTPSource, check_periods, open_vtp
from megavtp.checkpoint.reading import INDEX, is_checkpoint, named_step, open_checkpoint, step_folder
from megavtp.checkpoint.store import CheckpointStore
from megavtp.config.load import to_dict
from megavtp.config.sizes import narrowed
from megavtp.data.new_path import new_path
from megavtp.data.torch_file import write_torch_file
from megavtp.dit.checkpoint import AVERAGE, FACTS, TRAINED, artifact_of, dit_config, dit_tensors, is_dit
from megavtp.dit.config import CompleteDiTConfig, DiTConfig
from megavtp.dit.lightningdit import LightningDiT, lightningdit_tree, read_lightningdit
from megavtp.errors import UserError
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact, check_same_tokenizer

Format = Literal["native", "hf-vtp", "lightningdit"]
_DECODER = "pixel_decoder."
_WEIGHTS_ONLY = "weights only: training that goes on from them starts with a fresh optimizer"


def detect(path: str | Path) -> Format:
    """The form of what lies at ``path``. Raises UserError."""
    path = Path(path)
    if is_checkpoint(path):
        return "native"
    if (path / "config.json").is_file():
        return "hf-vtp"
    if path.is_file():
        return "lightningdit"
    missing = "does not exist" if not path.exists() else f"has neither {INDEX} nor config.json"
    raise UserError(f"--from {path} {missing}; give a checkpoint folder, a released model's folder or a .pt file")


def convert(
    path: str | Path, to: Format, out: str | Path, *, source_format: Format | None = None, captions: str | None = None,
    statistics: str | Path | None = None, decoder: str | Path | None = None, tokenizer: str | Path | None = None,
    module_prefix: bool = False,
) -> list[str]:
    """Write what lies at ``path`` in the form ``to`` at ``out``, which must not exist; nothing is left there on errors.

    Args:
        source_format: in place of ``detect``'s answer.
        captions, statistics, decoder: see ``convert_tokenizer``.
        tokenizer, module_prefix: see ``convert_dit``.

    Returns:
        Notes for the user: what the new form does not hold.
    """
    found = source_format or detect(path)
    if found == "lightningdit" and Path(path).is_dir():
        raise UserError(f"{path} is a folder, a LightningDiT is a .pt file: leave --from-format out, or name the file")
    is_a_dit = found == "lightningdit" or (found == "native" and _holds_dit(path))
    if is_a_dit and (to == "hf-vtp" or captions or statistics or decoder):
        raise UserError(f"{path} is a DiT; --to hf-vtp, --captions, --statistics and --decoder are for tokenizers")
    if not is_a_dit and (to == "lightningdit" or tokenizer):
        raise UserError(f"{path} is a tokenizer; --to lightningdit and --tokenizer are for DiTs")
    if module_prefix and to != "lightningdit":
        raise UserError(f"--module-prefix is for --to lightningdit, not for --to {to}; leave it out")
    if is_a_dit:
        return convert_dit(path, to, out, tokenizer, module_prefix)
    return convert_tokenizer(path, to, out, captions, statistics, found, decoder)


def _holds_dit(path: str | Path) -> bool:
    with open_checkpoint(path, verify="sizes") as checkpoint:
        return is_dit(checkpoint)


def convert_tokenizer(
    path: str | Path, to: Format, out: str | Path, captions: str | None = None, statistics: str | Path | None = None,
    source_format: Format | None = None, decoder: str | Path | None = None,
) -> list[str]:
    """Write the tokenizer at ``path`` as a folder ``out``, with its caption tokenizer and artifact beside the weights.

    Args:
        captions: "clip", a tokenizer's file, or "none", in place of the one the model names.
        statistics: LightningDiT's ``latents_stats.pt`` of this tokenizer's latents, to carry along.
        source_format: in place of what is found.
        decoder: another tokenizer, whose pixel decoder is taken; its encoder must be the same one.

    Returns:
        Notes for the user: what the new form does not hold.
    """
    source = open_vtp(path, source_format)
    if decoder is not None:
        source = _with_decoder(source, open_vtp(decoder))
    file = _captions(source, captions)
    artifact = replace(source.artifact, captions=_captions_name(file))
    if statistics is not None:
        artifact = replace(artifact, statistics=_statistics(statistics, artifact.latent_channels))
    with new_path(out) as folder:
        if to == "hf-vtp":
            save_folder(folder, source.config.model, source.tensors, source.released)
            notes = _left_out(source)
        else:
            notes = _save_native(folder, source)
        if isinstance(file, Path):
            shutil.copyfile(file, folder / str(artifact.captions))
        artifact.write(folder)
    return notes


def _with_decoder(source: VTPSource, other: VTPSource) -> VTPSource:
    """``source`` with the pixel decoder of ``other``."""
    if other.artifact.fingerprint != source.artifact.fingerprint:
        raise UserError(
            f"--decoder {other.path} was trained on another encoder than that of {source.path}; name a run that began "
            "from it, with objectives.reconstruction.frozen_encoder=true"
        )
    decoder = {name: tensor for name, tensor in other.tensors.items() if name.startswith(_DECODER)}
    if not decoder:
        raise UserError(f"--decoder {other.path} has no pixel decoder; name a run with the reconstruction objective")
    rest = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(_DECODER)}
    config = source.config
    model = replace(config.model, decoder=other.config.model.decoder)
    reconstruction = replace(config.objectives.reconstruction, weight=other.config.objectives.reconstruction.weight)
    objectives = replace(config.objectives, reconstruction=reconstruction)
    return replace(source, tensors=rest | decoder, config=replace(config, model=model, objectives=objectives))


def _left_out(source: VTPSource) -> list[str]:
    kept = source.tokenizer_tensors.keys()
    towers = sorted({name.split(".")[0] for name in source.tensors if name not in kept})
    return [f"left out, the released form has no place for them: {', '.join(towers)}"] if towers else []


def _save_native(folder: Path, source: VTPSource) -> list[str]:
    check_periods(source)
    tensors = {f"model/{name}": t for name, t in source.tensors.items() if not name.endswith(PERIODS)}
    write_native(folder, 0, tensors, source.config, {"released": dict(source.released)})
    return [_WEIGHTS_ONLY]


def convert_dit(
    path: str | Path, to: Format, out: str | Path, tokenizer: str | Path | None = None, module_prefix: bool = False
) -> list[str]:
    """Write the DiT at ``path`` as a native checkpoint, or as LightningDiT's ``.pt``: ``out`` itself, or in the folder
    ``out`` under LightningDiT's name for the step.

    Args:
        tokenizer: folder with the ``visual_tokenizer.json`` of the tokenizer, or of the latents, that the DiT belongs
            to; without it a native DiT made from a ``.pt`` keeps what is known, nothing. A DiT that knows its tokenizer
            takes no other.
        module_prefix: see ``lightningdit_tree``.
    """
    path, out = Path(path), Path(out)
    dit = _read_native_dit(path) if path.is_dir() or is_checkpoint(path) else read_lightningdit(path)
    notes = list(dit.notes)
    if tokenizer is not None:
        artifact = TokenizerArtifact.read(tokenizer)
        _fitting(artifact.needed_statistics(str(tokenizer)), dit.config.latent_channels, str(tokenizer))
        if dit.artifact is not None:
            check_same_tokenizer(dit.artifact, str(path), artifact, str(tokenizer))
        dit = replace(dit, artifact=artifact)
    if to == "native":
        if dit.artifact is None:
            notes.append("which tokenizer it belongs to is not known: name its folder with --tokenizer to state it")
        with new_path(out) as folder:
            _save_native_dit(folder, dit)
        return [*notes, _WEIGHTS_ONLY]
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
        artifact = artifact_of(checkpoint)  # first, as it says if this is no DiT
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


def write_native(
    folder: Path, step: int, tensors: Mapping[str, Tensor], config: Any, facts: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """One native checkpoint without optimizer state as ``folder``, which must not exist yet. Raises UserError."""
    name = folder.name.partition(".")[0]
    if named_step(name) not in (None, step):
        raise UserError(f"the weights are of step {step}, --out {name} says another: name it {step_folder(step)}")
    root = folder.with_name(folder.name + ".store")
    meta = {"config": to_dict(config), "optimizer_steps": 0, "version": __version__, **facts}
    try:
        store = CheckpointStore(root, keep_last=1)
        store.save(step, tensors, meta, copy=False)
        store.wait()
        os.rename(root / step_folder(step), folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _statistics(path: str | Path, channels: int) -> LatentStatistics:
    return _fitting(LatentStatistics.read(path), channels, str(path))


def _fitting(statistics: LatentStatistics, channels: int | None, where: str) -> LatentStatistics:
    if len(statistics.mean) != channels:
        raise UserError(f"{where} has statistics of {len(statistics.mean)} channels, the latents here have {channels}; "
                        "use those of this tokenizer")
    return statistics


def _captions(source: VTPSource, given: str | None) -> str | Path | None:
    """What the new folder refers to: "clip", a file to copy, or None."""
    if given == "none" or source.captions is None:
        return None
    found = source.captions if given is None else given
    if found == "clip":
        return "clip"
    if not Path(found).is_file():
        raise UserError(
            f"the caption tokenizer {found} does not exist: name it with --captions FILE, or leave it out with "
            "--captions none"
        )
    return Path(found)


def _captions_name(file: str | Path | None) -> str | None:
    if not isinstance(file, Path):
        return file
    return "captions.txt.gz" if file.name.endswith(".txt.gz") else "captions.model"
