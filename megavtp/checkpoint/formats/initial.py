"""Training can start from the weights of a tokenizer, an OpenCLIP model or a timm ViT (``model.init_from``)."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from megavtp.checkpoint.formats.fingerprint import NOT_READ
from megavtp.checkpoint.formats.foreign import ForeignWeights, unwrapped
from megavtp.checkpoint.formats.hf_vtp import PERIODS
from megavtp.checkpoint.formats.openclip import from_openclip, is_openclip
from megavtp.checkpoint.formats.timm_vit import from_timm, is_timm_vit, other_rotation
from megavtp.checkpoint.formats.vtp_source import check_periods, open_vtp
from megavtp.checkpoint.once import open_once
from megavtp.checkpoint.reading import Checkpoint
from megavtp.config.sizes import ResolvedModel
from megavtp.data.files import refuse_hub_id
from megavtp.data.weights_file import read_weights_file
from megavtp.errors import UserError
from megavtp.models.fitting import copy_whole, faults
from megavtp.models.vtp import VTP
from megavtp.parallel.collectives import together

_REMEDY = "model.init_from takes a checkpoint folder, a released folder, or an OpenCLIP or timm ViT weights file"
_BOTTLENECK = "trunk.feature_bottleneck.weight"
_HIDDEN = ("rope_dtype", "heads", "norm", "ffn", "clip_feature", "causal", "pool", "quick_gelu")


def open_sources(spec: str) -> dict[str, Checkpoint]:
    """Open the native checkpoints that ``spec`` names, by path, in a collective call: rank 0 alone verifies them."""
    paths = _paths(spec)
    together(lambda: [refuse_hub_id(path) for path in paths])
    found = {path: open_once(path) for path in paths}
    return {path: checkpoint for path, checkpoint in found.items() if checkpoint is not None}


def _paths(spec: str) -> list[str]:
    return [part.strip() for part in spec.split(",")]


def read_initial(
    spec: str, config: ResolvedModel, objectives: AbstractSet[str], frozen_encoder: bool = False,
    opened: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], list[str]]:
    """Read whole tensors by our names, checked against the whole model, and notes for the user.

    Args:
        spec: one path, or several separated by commas; a later one replaces what an earlier one gave.
        config: a resolved model, with the size of the vocabulary.
        frozen_encoder: the encoder will not be trained, so the sources must give all that decides a latent.
        opened: those of the sources that ``open_sources`` has opened.

    Raises:
        UserError: a source cannot be read or does not fit; every missing, unexpected and misshapen tensor is listed.
    """
    with torch.device("meta"):
        model = VTP(config, objectives=objectives)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for path in _paths(spec):
        found = _read(Path(path), config, shapes, opened.get(path))
        _check(found, shapes, path)
        tensors |= {name: tensor.float() for name, tensor in found.tensors.items()}
        towers = sorted({_tower(name) for name in found.tensors})
        notes += [f"initial weights from {path}: {', '.join(towers)}", *(f"{path}: {note}" for note in found.notes())]
        if "trunk" in towers and config.rope_dtype != "float32" and not Path(path).is_dir():
            notes.append(
                f"{path}: its library computes queries and keys in float32; with model.rope_dtype={config.rope_dtype} "
                "they are rounded, model.rope_dtype=float32 gives its numbers"
            )
    drawn = [name for name in shapes if _tower(name) == "trunk" and name not in tensors and name not in NOT_READ]
    if frozen_encoder and drawn:
        raise UserError(
            f"{spec} does not give {', '.join(drawn)}, which would keep random values in a "
            "frozen encoder; name a checkpoint that has all of it with model.init_from"
        )
    if rest := sorted({_tower(name) for name in shapes if name not in tensors and _tower(name) != "teacher"}):
        notes.append(f"drawn anew, at least in part: {', '.join(rest)}")
    return tensors, notes


def fill(model: VTP, tensors: Mapping[str, Tensor]) -> None:
    """Fill what this rank holds of the model; a teacher that ``tensors`` lacks becomes a copy of the student."""
    copy_whole(dict(model.named_parameters()), tensors, model.mesh)
    if not any(name.startswith("teacher.") for name in tensors):
        model.start_averages()


def _tower(name: str) -> str:
    return name.split(".")[0]


def _read(
    path: Path, config: ResolvedModel, shapes: Mapping[str, list[int]], opened: Checkpoint | None
) -> ForeignWeights:
    if opened is not None or path.is_dir():
        return _read_vtp(path, config, shapes, opened)
    state = unwrapped(read_weights_file(path, "no weights", _REMEDY))
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if empty := [name for name, tensor in state.items() if not tensor.numel()]:
        raise UserError(f"{path} is damaged: {', '.join(empty)} hold no numbers; {_REMEDY}")
    if is_openclip(state):
        return from_openclip(state, config, shapes)
    if not is_timm_vit(state):
        raise UserError(f"{path} is neither of OpenCLIP nor a timm ViT; {_REMEDY}")
    if why := other_rotation(state):
        raise UserError(f"{path} is {why}; give a DINOv3, DINOv2 or supervised ViT")
    return from_timm(state)


def _read_vtp(
    path: Path, config: ResolvedModel, shapes: Mapping[str, list[int]], opened: Checkpoint | None
) -> ForeignWeights:
    source = open_vtp(path, opened=opened)
    check_periods(source)
    towers = {_tower(name) for name in shapes}
    found, there = ForeignWeights(), source.config
    # A run without reconstruction has not trained its bottleneck, unless other objectives read it. Which run made a
    # released model (step 0) is not known.
    unread = source.step > 0 and there.objectives.reconstruction.weight == 0
    if unread and there.model.bottleneck_reconstruction_only:
        found.fresh.add(_BOTTLENECK)
    for name, tensor in source.tensors.items():
        if name in found.fresh:
            found.left_out[name] = "its run had no use for it and did not train it"
        elif _tower(name) not in towers:
            found.left_out[_tower(name)] = "the objective that needs it is off"
        elif not name.endswith(PERIODS):
            found.tensors[name] = tensor
    if other := _other_settings(there.model, config, {_tower(name) for name in found.tensors}):
        raise UserError(f"{path} was trained as another model: {'; '.join(other)}; set these keys as there")
    return found


def _other_settings(there: ResolvedModel, here: ResolvedModel, towers: AbstractSet[str]) -> list[str]:
    """Return the settings that differ, change what the weights compute, and do not show in the weights' shapes."""
    pairs = [("model", there, here)]
    for tower, section in (("trunk", "vision"), ("text", "text"), ("pixel_decoder", "decoder")):
        if tower in towers:
            pairs.append((f"model.{section}", getattr(there, section), getattr(here, section)))
    return [
        f"{prefix}.{name} is {getattr(one, name)} there" for prefix, one, other in pairs
        for name in _HIDDEN if hasattr(one, name) and getattr(one, name) != getattr(other, name)
    ]


def _check(found: ForeignWeights, shapes: Mapping[str, list[int]], path: str) -> None:
    towers = {_tower(name) for name in found.tensors}
    if not towers:
        raise UserError(f"{path} has nothing for this model: {'; '.join(found.notes()) or 'no weights'}")
    required = [name for name in shapes if _tower(name) in towers and name not in found.fresh]
    wrong = [f"unexpected {name}" for name in found.unknown] + faults(found.tensors, shapes, required)
    if wrong:
        raise UserError(f"{path} does not fit this model; change its model keys or leave it out: {'; '.join(wrong)}")
