"""LightningDiT's checkpoint is a ``.pt`` with ``model``, ``ema`` and ``config`` (github.com/hustvl/LightningDiT).

``DiT.state_dict`` has its keys, so only prefixes, the fixed position tables and the settings are translated. The
settings are read from the tensors' shapes and from what the checkpoint states.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.formats.foreign import unwrapped
from megavtp.config.ranges import MAX_DEPTH
from megavtp.data.weights_file import read_weights_file
from megavtp.dit.checkpoint import WholeDiT
from megavtp.dit.config import SIZES, CompleteDiT, DiTConfig, DiTModelConfig, DiTSize, complete_config, complete_dit
from megavtp.dit.model.model import DiT
from megavtp.dit.model.positions import POSITIONS, position_tables
from megavtp.dit.validate import check_dit_model
from megavtp.errors import UserError
from megavtp.models.fitting import check, faults

_Parts = Mapping[str, Mapping[str, Tensor]]  # "model", "ema" or both -> LightningDiT's keys -> tensors
_REMEDY = "give a LightningDiT checkpoint (STEP.pt); OpenCLIP and timm weights go into model.init_from"
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
    tree = read_weights_file(path, "not a checkpoint", _REMEDY)
    parts, stated = _parts(tree, path), _stated_settings(tree)
    config = _infer_config(parts, stated, path)
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
    return {**parts, "config": {"model": _settings_to_state(config)}}


def _parts(tree: Mapping[str, Any], path: Path) -> _Parts:
    """Return one or both sets of weights, without the prefixes of wrappers. UserError if something else is in their
    place, which must not be ignored."""
    parts: dict[str, Any] = {name: tree[name] for name in ("model", "ema") if name in tree} or {"ema": tree}
    for part, state in parts.items():
        items = state.items() if isinstance(state, dict) else ()
        if not items or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
            if state is tree:
                raise UserError(f"{path} holds neither model nor ema nor a state dict; {_REMEDY}")
            raise UserError(f"{path}: its {part!r} is no state dict of tensors; use a file that is whole")
        parts[part] = unwrapped(state)
    return parts


def _check(parts: _Parts, config: CompleteDiT, stated: Mapping[str, int], path: Path) -> None:
    """Raise UserError that lists all that does not fit, in every part."""
    depth = stated.get("depth", 0)  # the blocks that are missing are then listed
    shapes = dit_shapes(replace(config, depth=depth) if 0 < depth <= MAX_DEPTH else config)
    found = [f"({part}) {'; '.join(wrong)}" for part, state in parts.items() if (wrong := faults(state, shapes))]
    found += [
        f"its own config says {name} {value}, the tensors {getattr(config, name)}" for name, value in stated.items()
        if value != getattr(config, name)
    ]
    if not found:
        drift = {"pos_embed": _SHRUNK}
        try:
            check_dit_model(config)
            found = [
                f"({part}) {name} is not the fixed position table of its sizes, and this DiT has no other"
                for part, state in parts.items() for name, table in position_tables(config).items()
                if not torch.allclose(state[name].float(), table, rtol=drift.get(name, 0), atol=_SAME)
            ]
        except UserError as error:  # sizes that fit one another make no valid DiT
            found = [str(error)]
    if found:
        raise UserError(f"{path} does not fit its model config: {'; '.join(found)}; use a file that is whole")


def dit_shapes(config: CompleteDiT) -> dict[str, list[int]]:
    """Return LightningDiT's key and shape of every tensor, position tables included."""
    with torch.device("meta"):
        state = DiT(config).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def _infer_config(parts: _Parts, stated: Mapping[str, int], path: Path) -> CompleteDiT:
    """Infer the settings from the tensors' shapes. The tensors need not be in all parts, nor fit (``fitting.faults``).

    Raises:
        UserError: it is another model or an unsupported variant of LightningDiT, or no part shows one of the sizes.
    """
    shapes = {name: shape for name, rank in _TELLING.items() if (shape := _shape(parts, name, rank)) is not None}
    names = set().union(*parts.values())
    depth = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
    qk_norm = _has(names, ".attn.q_norm.weight")
    if not shapes or not depth:
        raise UserError(f"{path} is no LightningDiT: it lacks {', '.join(_TELLING)} or blocks; {_REMEDY}")
    if depth > MAX_DEPTH:
        raise UserError(f"{path} has {depth} blocks, which no LightningDiT has; {_REMEDY}")
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
    if len(shapes) < len(_TELLING):
        wrong = _faults_without_sizes(parts, depth, qk_norm)
        raise UserError(f"{path} does not show its sizes: {wrong}; use a file that is whole")
    heads = max(width // shapes["feat_rope.freqs_cos"][1], 1)
    return complete_dit(DiTModelConfig(
        size=_size(width, depth, heads) or "xl", width=width, depth=depth, heads=heads, patch_size=patch,
        qk_norm=qk_norm, latent_size=math.isqrt(shapes["pos_embed"][1]) * patch, latent_channels=channels,
        num_classes=rows - 1,
    ))


def _stated_settings(tree: Mapping[str, Any]) -> dict[str, int]:
    """Return what the ``config`` of a checkpoint says of its model, by our names; empty if it has none."""
    config = tree.get("config")
    named = config.items() if isinstance(config, dict) else ()
    sections = {name: part for name, part in named if isinstance(part, dict)}
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


def _settings_to_state(config: CompleteDiT) -> dict[str, Any]:
    """Return the arguments of LightningDiT's constructor."""
    size = _size(config.width, config.depth, config.heads)
    named = {"model_type": f"LightningDiT-{_NAMES[size]}/{config.patch_size}"} if size in _NAMES else {}
    return {
        **named, "input_size": config.latent_size, "patch_size": config.patch_size,
        "in_channels": config.latent_channels, "hidden_size": config.width, "depth": config.depth,
        "num_heads": config.heads, "num_classes": config.num_classes, "use_qknorm": config.qk_norm,
        "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False,
    }


def _shape(parts: _Parts, name: str, rank: int) -> tuple[int, ...] | None:
    """Return the shape in the first part that has ``name`` with ``rank`` dimensions, none of them 0."""
    found = (part[name].shape for part in parts.values() if name in part)
    return next((tuple(shape) for shape in found if len(shape) == rank and 0 not in shape), None)


def _has(names: set[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def _size(width: int, depth: int, heads: int) -> DiTSize | None:
    return next((size for size, shape in SIZES.items() if shape == (width, depth, heads)), None)


def _faults_without_sizes(parts: _Parts, depth: int, qk_norm: bool) -> str:
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
