"""LightningDiT's checkpoint: one ``.pt`` with ``model``, ``ema`` and ``config`` (github.com/hustvl/LightningDiT).

``DiT.state_dict`` has its keys, so only prefixes, the fixed position tables and the settings are translated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.formats.fitting import check
from megavtp.checkpoint.formats.weights_file import read_weights_file
from megavtp.config.dit import SIZES, DiTConfig, DiTModelConfig
from megavtp.data.artifact import TokenizerArtifact
from megavtp.errors import UserError
from megavtp.models.dit import DiT
from megavtp.models.dit_positions import pair_tables, sine_positions

POSITIONS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
_REMEDY = "give a LightningDiT checkpoint (STEP.pt); OpenCLIP and timm weights go into model.init_from"
_WRAPPED = "module."  # what DistributedDataParallel puts before every key
_SAME = 1e-5  # of a position table: the official one comes from another order of the same operations
_NAMES = {"b": "B", "l": "L", "xl": "XL", "1p0b": "1p0B", "1p6b": "1p6B"}


@dataclass(frozen=True)
class LightningDiT:
    """What was read, from whichever form.

    Attributes:
        weights, average: trained parameters and their moving average, by LightningDiT's keys, without prefixes and
            position tables.
        step: from the file's name, else 0.
        notes: for the user.
        artifact: the tokenizer of the latents, run: the whole configuration, facts: further ones; a ``.pt`` has none.
    """

    config: DiTModelConfig
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    step: int
    notes: list[str]
    artifact: TokenizerArtifact | None = None
    run: DiTConfig | None = None
    facts: dict[str, Any] | None = None


def dit_shapes(config: DiTModelConfig) -> dict[str, list[int]]:
    """LightningDiT's key and shape of every tensor, position tables included, of a resolved config."""
    with torch.device("meta"):
        state = DiT(config).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def read_lightningdit(path: str | Path) -> LightningDiT:
    """Read a checkpoint, or a bare state dict, ``.pt`` or ``.safetensors``; keys may carry ``module.``.

    Raises:
        UserError: not such a file, one that holds more than tensors, a variant that MegaVTP does not have, or tensors
            that do not fit together: every missing, unexpected and misshapen one is listed.
    """
    path = Path(path)
    tree = read_weights_file(path, "not a checkpoint", _REMEDY)
    parts = {name: _plain(tree[name]) for name in ("model", "ema") if _is_state(tree.get(name))}
    notes = []
    if not parts and _is_state(tree):
        parts = {"ema": _plain(tree)}
    if not parts:
        raise UserError(f"{path} holds neither model nor ema nor a state dict; {_REMEDY}")
    if len(parts) == 1:
        (only,) = parts
        parts = {"model": parts[only], "ema": parts[only]}
        notes.append(f"{path} has only one set of weights: it serves as the trained and as the averaged one")
    config = infer_config(parts["ema"], path)
    shapes = dit_shapes(config)
    for name, state in parts.items():
        check(state, shapes, f"{path} ({name})")
        _check_positions(state, config, path)
    weights, average = ({k: v.float() for k, v in parts[p].items() if k not in POSITIONS} for p in ("model", "ema"))
    return LightningDiT(config, weights, average, int(path.stem) if path.stem.isdecimal() else 0, notes)


def lightningdit_tree(
    config: DiTModelConfig, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What ``torch.save`` writes: plain keys, position tables included. UserError for what the format cannot say."""
    if config.condition != "class":
        raise UserError(f"model.condition={config.condition} has no LightningDiT form: only class-conditioned ones do")
    tables, shapes = _positions(config), dit_shapes(config)
    parts = {}
    for part, state in (("model", weights), ("ema", average)):
        whole = {**tables, **state}
        check(whole, shapes, f"the DiT ({part})")
        parts[part] = {name: whole[name].detach().to("cpu", torch.float32).contiguous() for name in shapes}
    return {**parts, "config": {"model": _settings(config)}}


def infer_config(state: Mapping[str, Tensor], path: Path) -> DiTModelConfig:
    """The settings that the tensors' shapes show. UserError for another model and for variants of LightningDiT."""
    needed = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "pos_embed")
    if lacking := [name for name in needed if name not in state]:
        raise UserError(f"{path} is no LightningDiT: it lacks {', '.join(lacking)}; {_REMEDY}")
    width, channels, patch = state[needed[0]].shape[:3]
    side = math.isqrt(state["pos_embed"].shape[1])
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    variants = {
        "use_rope=false": "feat_rope.freqs_cos" not in state,
        "use_rmsnorm=false": "blocks.0.norm1.weight" not in state,
        "use_swiglu=false": "blocks.0.mlp.fc1.weight" in state,
        "wo_shift=true": state.get("blocks.0.adaLN_modulation.1.weight", torch.empty(0)).shape[0] == 4 * width,
        "learn_sigma=true": state["final_layer.linear.weight"].shape[0] == 2 * patch * patch * channels,
    }
    if unsupported := [name for name, found in variants.items() if found]:
        raise UserError(f"{path} was made with {', '.join(unsupported)}, which this DiT does not have")
    heads = max(width // state["feat_rope.freqs_cos"].shape[-1], 1)
    shape = (width, len(blocks), heads)
    return DiTModelConfig(
        size=next((name for name, size in SIZES.items() if size == shape), "xl"), width=width, depth=len(blocks),
        heads=heads, patch_size=patch, qk_norm="blocks.0.attn.q_norm.weight" in state, latent_size=side * patch,
        latent_channels=channels, num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )


def _settings(config: DiTModelConfig) -> dict[str, Any]:
    """The constructor arguments of LightningDiT."""
    shape = (config.width, config.depth, config.heads)
    size = next((_NAMES[name] for name, known in SIZES.items() if known == shape and name in _NAMES), None)
    named = {"model_type": f"LightningDiT-{size}/{config.patch_size}"} if size else {}
    return {
        **named, "input_size": config.latent_size, "patch_size": config.patch_size,
        "in_channels": config.latent_channels, "hidden_size": config.width, "depth": config.depth,
        "num_heads": config.heads, "num_classes": config.num_classes, "use_qknorm": config.qk_norm,
        "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False,
    }


def _positions(config: DiTModelConfig) -> dict[str, Tensor]:
    side = config.latent_size // config.patch_size
    tables = pair_tables(config.width // config.heads, side)
    return dict(zip(POSITIONS, (sine_positions(config.width, side)[None], *tables)))


def _check_positions(state: Mapping[str, Tensor], config: DiTModelConfig, path: Path) -> None:
    for name, expected in _positions(config).items():
        if not torch.allclose(state[name].float(), expected, rtol=0, atol=_SAME):
            raise UserError(f"{path}: {name} is not the fixed position table of its sizes; this DiT has no other")


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers, if all keys have them."""
    while all(name.startswith(_WRAPPED) for name in state):
        state = {name.removeprefix(_WRAPPED): tensor for name, tensor in state.items()}
    return dict(state)
