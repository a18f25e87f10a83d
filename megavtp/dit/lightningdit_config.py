"""The settings of a LightningDiT are read from its tensors' shapes and from what its checkpoint states."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.config.ranges import MAX_DEPTH
from megavtp.dit.config import SIZES, CompleteDiT, DiTModelConfig, DiTSize, complete_dit
from megavtp.dit.model.model import DiT
from megavtp.errors import UserError
from megavtp.models.fitting import faults

Parts = Mapping[str, Mapping[str, Tensor]]  # "model", "ema" or both -> LightningDiT's keys -> tensors

REMEDY = "give a LightningDiT checkpoint (STEP.pt); OpenCLIP and timm weights go into model.init_from"
_NAMES: dict[DiTSize, str] = {"b": "B", "l": "L", "xl": "XL", "1p0b": "1p0B", "1p6b": "1p6B"}
# The tensors that show the sizes, with their number of dimensions.
_TELLING = {
    "x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2,
    "pos_embed": 3, "feat_rope.freqs_cos": 2,
}
# Our names map to section and key of the checkpoint's ``config``: constructor arguments, or keys of a YAML file.
_STATED = {
    "width": [("model", "hidden_size")], "depth": [("model", "depth")], "heads": [("model", "num_heads")],
    "patch_size": [("model", "patch_size")], "qk_norm": [("model", "use_qknorm")],
    "latent_size": [("model", "input_size")], "latent_channels": [("model", "in_channels"), ("model", "in_chans")],
    "num_classes": [("model", "num_classes"), ("data", "num_classes")],
}


def dit_shapes(config: CompleteDiT) -> dict[str, list[int]]:
    """Return LightningDiT's key and shape of every tensor, position tables included."""
    with torch.device("meta"):
        state = DiT(config).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def infer_config(parts: Parts, stated: Mapping[str, int], path: Path) -> CompleteDiT:
    """Infer the settings from the tensors' shapes. The tensors need not be in all parts, nor fit (``fitting.faults``).

    Raises:
        UserError: it is another model or an unsupported variant of LightningDiT, or no part shows one of the sizes.
    """
    shapes = {name: shape for name, rank in _TELLING.items() if (shape := _shape(parts, name, rank)) is not None}
    names = set().union(*parts.values())
    depth = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
    qk_norm = _has(names, ".attn.q_norm.weight")
    if not shapes or not depth:
        raise UserError(f"{path} is no LightningDiT: it lacks {', '.join(_TELLING)} or blocks; {REMEDY}")
    if depth > MAX_DEPTH:
        raise UserError(f"{path} has {depth} blocks, which no LightningDiT has; {REMEDY}")
    _refuse_variants(parts, names, shapes, stated, path)
    if len(shapes) < len(_TELLING):
        wrong = _faults_without_sizes(parts, depth, qk_norm)
        raise UserError(f"{path} does not show its sizes: {wrong}; use a file that is whole")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = max(width // shapes["feat_rope.freqs_cos"][1], 1)
    return complete_dit(DiTModelConfig(
        size=_size(width, depth, heads) or "xl", width=width, depth=depth, heads=heads, patch_size=patch,
        qk_norm=qk_norm, latent_size=math.isqrt(shapes["pos_embed"][1]) * patch, latent_channels=channels,
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
    ))


def stated_settings(tree: Mapping[str, Any]) -> dict[str, int]:
    """Return what the ``config`` of a checkpoint says of its model, by our names; empty if it has none."""
    config = tree.get("config")
    config = config if isinstance(config, dict) else {}
    sections = {name: part for name, part in config.items() if isinstance(part, dict)}
    found: dict[str, int] = {}
    kind = re.fullmatch(r"LightningDiT-(\w+)/(\d{1,4})", str(sections.get("model", {}).get("model_type")))
    size = next((size for size, name in _NAMES.items() if kind and name == kind[1]), None)
    if kind and size:
        found = {**dict(zip(("width", "depth", "heads"), SIZES[size])), "patch_size": int(kind[2])}
    for name, places in _STATED.items():
        for section, key in places:
            if isinstance(value := sections.get(section, {}).get(key), int):
                found[name] = value
    return found


def settings_to_state(config: CompleteDiT) -> dict[str, Any]:
    """Return the arguments of LightningDiT's constructor."""
    size = _size(config.width, config.depth, config.heads)
    named = {"model_type": f"LightningDiT-{_NAMES[size]}/{config.patch_size}"} if size in _NAMES else {}
    return {
        **named, "input_size": config.latent_size, "patch_size": config.patch_size,
        "in_channels": config.latent_channels, "hidden_size": config.width, "depth": config.depth,
        "num_heads": config.heads, "num_classes": config.num_classes, "use_qknorm": config.qk_norm,
        "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False,
    }


def _shape(parts: Parts, name: str, rank: int) -> tuple[int, ...] | None:
    """Return the shape in the first part that has ``name`` with ``rank`` dimensions, none of them 0."""
    found = (part[name].shape for part in parts.values() if name in part)
    return next((tuple(shape) for shape in found if len(shape) == rank and 0 not in shape), None)


def _has(names: set[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def _size(width: int, depth: int, heads: int) -> DiTSize | None:
    return next((size for size, shape in SIZES.items() if shape == (width, depth, heads)), None)


def _refuse_variants(
    parts: Parts, names: set[str], shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, int], path: Path
) -> None:
    width, channels, patch, _ = shapes.get("x_embedder.proj.weight", (0, 0, 0, 0))
    out = shapes.get("final_layer.linear.weight", (0,))[0]
    rows = shapes.get("y_embedder.embedding_table.weight", (0,))[0]
    modulation = _shape(parts, "blocks.0.adaLN_modulation.1.weight", 2) or (0,)
    variants = {
        "use_rope=false": not _has(names, ".freqs_cos"),
        "use_rmsnorm=false": not _has(names, ".norm1.weight"),
        "use_swiglu=false": _has(names, ".mlp.fc1.weight"),
        "wo_shift=true": width > 0 and modulation[0] == 4 * width,
        "learn_sigma=true": out > 0 and out == 2 * patch * patch * channels,
        "class_dropout_prob=0": rows > 0 and rows == stated.get("num_classes"),  # there is no row for "no class"
    }
    if unsupported := [name for name, found in variants.items() if found]:
        raise UserError(f"{path} was made with {', '.join(unsupported)}, which this DiT does not have")


def _faults_without_sizes(parts: Parts, depth: int, qk_norm: bool) -> str:
    """List the faults that the names alone show, and those of the tensors that should show the sizes."""
    some = complete_dit(DiTModelConfig(
        width=4, depth=depth, heads=1, qk_norm=qk_norm, latent_size=1, latent_channels=1, num_classes=1
    ))
    found = []
    for part, state in parts.items():
        expected = {name: state[name].shape if name in state else shape for name, shape in dit_shapes(some).items()}
        wrong = faults(state, expected)
        wrong += [
            f"{name} has shape {list(state[name].shape)}, not {rank} dimensions" for name, rank in _TELLING.items()
            if name in state and (state[name].ndim != rank or not state[name].numel())
        ]
        found += [f"({part}) {'; '.join(wrong)}"] if wrong else []
    return "; ".join(found)
