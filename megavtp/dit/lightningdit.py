"""LightningDiT's checkpoint is a ``.pt`` with ``model``, ``ema`` and ``config`` (github.com/hustvl/LightningDiT).

``DiT.state_dict`` has its keys, so only prefixes, the fixed position tables and the settings are translated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.config.ranges import MAX_DEPTH
from megavtp.data.weights_file import read_weights_file
from megavtp.dit.checkpoint import WholeDiT
from megavtp.dit.config import CompleteDiT, DiTConfig, complete_config
from megavtp.dit.lightningdit_config import (
    REMEDY,
    Parts,
    dit_shapes,
    infer_config,
    settings_to_state,
    stated_settings,
)
from megavtp.dit.model.positions import POSITIONS, position_tables
from megavtp.dit.validate import check_dit_model
from megavtp.errors import UserError
from megavtp.models.fitting import check, faults

_WRAPPED = "module."  # DistributedDataParallel puts this before every key
_SAME = 1e-5  # tolerance of a position table: the official one has another order of the same operations
# LightningDiT averages pos_embed along with the weights, though it never changes: every float32 update shrinks it a
# little, in the end by 1.66e-4 of its value. Training that starts from such an average shrinks it twice.
_SHRUNK = 1e-3
_NOT_IN_SHAPES = ("depth", "heads", "num_classes")  # a file that lacks blocks or rows shows other values


def read_lightningdit(path: str | Path) -> WholeDiT:
    """Read a checkpoint or a plain state dict, ``.pt`` or ``.safetensors``; keys may begin with ``module.``.

    Raises:
        UserError: the file is of another kind, holds more than tensors, or is a variant that MegaVTP does not have; or
            its tensors do not fit together or the file's own config, and all that are missing, unexpected or misshapen
            are listed.
    """
    path = Path(path)
    tree = read_weights_file(path, "not a checkpoint", REMEDY)
    parts, stated = _parts(tree, path), stated_settings(tree)
    config = infer_config(parts, stated, path)
    _check(parts, config, stated, path)
    table = position_tables(config)["pos_embed"]
    notes = []
    off = max(float((state["pos_embed"] - table).abs().max()) for state in parts.values())
    if off > _SAME:
        notes.append(
            f"the position table in {path} is off by {off:.1g}, as averaging it in float32 leaves it; the exact one is "
            "used and written"
        )
    if unsaid := [name for name in _NOT_IN_SHAPES if name not in stated]:
        notes.append(f"{path} does not state its {', '.join(unsaid)}: taken from the tensors that are there")
    if len(parts) == 1:
        (only,) = parts.values()
        parts = {"model": only, "ema": only}
        notes.append(f"{path} has only one set of weights: it serves as the trained and as the averaged one")
    weights, average = ({k: v.float() for k, v in parts[p].items() if k not in POSITIONS} for p in ("model", "ema"))
    step = int(path.stem) if path.stem.isdecimal() else 0
    run = complete_config(DiTConfig(model=config))
    return WholeDiT(run, step, weights=weights, average=average, notes=notes)


def lightningdit_tree(dit: WholeDiT, *, module_prefix: bool = False) -> dict[str, Any]:
    """Return what ``torch.save`` writes, position tables included. UserError for what the format cannot express.

    With ``module_prefix``, "module." precedes the keys of the trained weights, as LightningDiT's training needs it to
    resume.
    """
    config = dit.config.model
    if config.condition != "class":
        raise UserError(f"model.condition={config.condition} has no LightningDiT form: only class-conditioned ones do")
    tables, shapes = position_tables(config), dit_shapes(config)
    parts = {}
    for part, state in (("model", dit.weights), ("ema", dit.average)):
        whole = {**tables, **state}
        check(whole, shapes, f"the DiT ({part})")
        before = _WRAPPED if module_prefix and part == "model" else ""
        parts[part] = {before + name: whole[name].detach().to("cpu", torch.float32).contiguous() for name in shapes}
    return {**parts, "config": {"model": settings_to_state(config)}}


def _parts(tree: Mapping[str, Any], path: Path) -> Parts:
    """Return one or both sets of weights, without the prefixes of wrappers. UserError if something else is in their
    place, which must not be ignored."""
    parts: dict[str, Any] = {name: tree[name] for name in ("model", "ema") if name in tree} or {"ema": tree}
    for part, state in parts.items():
        items = state.items() if isinstance(state, dict) else ()
        if not items or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
            if state is tree:
                raise UserError(f"{path} holds neither model nor ema nor a state dict; {REMEDY}")
            raise UserError(f"{path}: its {part!r} is no state dict of tensors; use a file that is whole")
        while all(name.startswith(_WRAPPED) for name in state):
            state = {name.removeprefix(_WRAPPED): tensor for name, tensor in state.items()}
        parts[part] = state
    return parts


def _check(parts: Parts, config: CompleteDiT, stated: Mapping[str, int], path: Path) -> None:
    """Raise UserError that lists all that does not fit, in every part."""
    depth = stated.get("depth", 0)  # the blocks that are missing are then listed
    shapes = dit_shapes(replace(config, depth=depth) if 0 < depth <= MAX_DEPTH else config)
    found = [f"({part}) {'; '.join(wrong)}" for part, state in parts.items() if (wrong := faults(state, shapes))]
    found += [
        f"its own config says {name} {value}, the tensors {getattr(config, name)}" for name, value in stated.items()
        if value != getattr(config, name)
    ]
    if not found:
        try:
            check_dit_model(config)
            found = [f"({part}) {fault}" for part, state in parts.items() for fault in _other_positions(state, config)]
        except UserError as error:  # sizes that fit one another make no valid DiT
            found = [str(error)]
    if found:
        raise UserError(f"{path} does not fit its model config: {'; '.join(found)}; use a file that is whole")


def _other_positions(state: Mapping[str, Tensor], config: CompleteDiT) -> list[str]:
    return [
        f"{name} is not the fixed position table of its sizes, and this DiT has no other"
        for name, expected in position_tables(config).items()
        if not torch.allclose(state[name].float(), expected, rtol=_SHRUNK if name == "pos_embed" else 0, atol=_SAME)
    ]
