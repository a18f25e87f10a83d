"""This converts a tokenizer between the checkpoint of a run and the folder of a released model."""

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
from megavtp.checkpoint.reading import named_step, step_folder
from megavtp.checkpoint.store import CheckpointStore
from megavtp.config.load import to_dict
from megavtp.data.all_or_nothing import all_or_nothing
from megavtp.errors import UserError
from megavtp.latents.artifact import LatentStatistics

Format = Literal["native", "hf-vtp", "lightningdit"]
_DECODER = "pixel_decoder."
WEIGHTS_ONLY = "weights only: training that goes on from them starts with a fresh optimizer"


def convert_tokenizer(
    path: str | Path, to: Format, out: str | Path, captions: str | None = None, statistics: str | Path | None = None,
    source_format: Format | None = None, decoder: str | Path | None = None,
) -> list[str]:
    """Write the tokenizer at ``path`` as a folder ``out``, with its caption tokenizer and artifact beside the weights.

    Args:
        captions: "clip", a caption tokenizer's file, or "none"; replaces the one that the model names.
        statistics: LightningDiT's ``latents_stats.pt`` of this tokenizer's latents, to carry along.
        source_format: replaces the format that is found.
        decoder: another tokenizer with the same encoder, whose pixel decoder is used.

    Returns:
        Notes for the user on what the new format does not hold.
    """
    source = open_vtp(path, source_format)
    if decoder is not None:
        source = _with_decoder(source, open_vtp(decoder))
    file, name = _captions(source, captions)
    artifact = replace(source.artifact, captions=name)
    if statistics is not None:
        read = LatentStatistics.read(statistics)
        artifact = replace(artifact, statistics=check_fitting(read, artifact.latent_channels, str(statistics)))
    with all_or_nothing(out) as folder:
        if to == "hf-vtp":
            save_folder(folder, source.config.model, source.tokenizer_tensors, source.released)
            kept = source.tokenizer_tensors.keys()
            rest = sorted({name.split(".")[0] for name in source.tensors if name not in kept})
            notes = [f"left out, the released form has no place for them: {', '.join(rest)}"] if rest else []
        else:
            check_periods(source)
            tensors = {f"model/{name}": t for name, t in source.tensors.items() if not name.endswith(PERIODS)}
            write_native(folder, 0, tensors, source.config, {"released": dict(source.released)})
            notes = [WEIGHTS_ONLY]
        if file is not None:
            shutil.copyfile(file, folder / str(artifact.captions))
        artifact.write(folder)
    return notes


def _with_decoder(source: VTPSource, other: VTPSource) -> VTPSource:
    if other.artifact.fingerprint != source.artifact.fingerprint:
        raise UserError(
            f"--decoder {other.path} was trained on another encoder than that of {source.path}; name a run of "
            "launchers/train_decoder.py that began from it"
        )
    decoder = {name: tensor for name, tensor in other.tokenizer_tensors.items() if name.startswith(_DECODER)}
    if not decoder:
        raise UserError(f"--decoder {other.path} has no pixel decoder; name a run with the reconstruction objective")
    rest = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(_DECODER)}
    config = source.config
    model = replace(config.model, decoder=other.config.model.decoder)
    reconstruction = replace(config.objectives.reconstruction, weight=other.config.objectives.reconstruction.weight)
    objectives = replace(config.objectives, reconstruction=reconstruction)
    return replace(source, tensors=rest | decoder, config=replace(config, model=model, objectives=objectives))


def write_native(
    folder: Path, step: int, tensors: Mapping[str, Tensor], config: Any, facts: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write a native checkpoint without optimizer state as ``folder``, which must not exist yet. Raises UserError."""
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


def _captions(source: VTPSource, given: str | None) -> tuple[Path | None, str | None]:
    """Return the file to copy, if there is one, and what the new artifact names: "clip", the file's copy, or None."""
    if given == "none" or source.captions is None:
        return None, None
    found = source.captions if given is None else given
    if found == "clip":
        return None, "clip"
    if not Path(found).is_file():
        raise UserError(
            f"the caption tokenizer {found} does not exist: name it with --captions FILE, or leave it out with "
            "--captions none"
        )
    return Path(found), "captions.txt.gz" if str(found).endswith(".txt.gz") else "captions.model"


def check_fitting(statistics: LatentStatistics, channels: int | None, where: str) -> LatentStatistics:
    """Return the statistics; UserError unless they have ``channels`` channels."""
    if len(statistics.mean) != channels:
        raise UserError(f"{where} has statistics of {len(statistics.mean)} channels, the latents here have {channels}; "
                        "use those of this tokenizer")
    return statistics
