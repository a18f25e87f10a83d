"""The official VTP folder holds ``config.json`` and ``model.safetensors`` (huggingface.co/MiniMaxAI/VTP-Large-f16d64).

"Official" names are those in that file; "our" names are those of ``VTP``'s parameters and buffers.
"""

import json
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.formats.hf_vtp_config import config_from_official, config_to_official, read_keys
from megavtp.checkpoint.tensor_file import write_tensors
from megavtp.config.sizes import ResolvedModel
from megavtp.data.files import replaced, write_atomic
from megavtp.data.weights_file import read_safetensors
from megavtp.errors import UserError
from megavtp.json_file import read_json
from megavtp.models.fitting import check
from megavtp.models.vtp import OBJECTIVES, VTP
from megavtp.nn.rope import DTYPES, rope_periods

# A tower that each exported objective has; the DINO head and the teacher have no official place.
EXPORTED = {"contrastive": "visual_proj.", "reconstruction": "pixel_decoder."}
PERIODS = ".rope_embed.periods"
# Parts of a text block by our names and by the official ones, which are OpenCLIP's.
TEXT_BLOCK = {
    "norm1.": "ln_1.", "norm2.": "ln_2.", "ls1.": "ls_1.", "ls2.": "ls_2.", "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
}
SCALARS = ("logit_scale", "logit_bias")  # their official shape is (), as a rule; here it is (1,)
# No setting here corresponds to these keys of ``config.json``. What a released folder says in them is written back.
_KEPT = ("nonscalar_logit_scale", "text_output_tokens", "text_pad_id", "transformers_version")
NOTHING: Mapping[str, Any] = MappingProxyType({})  # the ``config.json`` of a model that was not released
_REMEDY = "give the folder of an official VTP checkpoint"


def official_name(name: str, config: ResolvedModel) -> str:
    """Return the official name of one of our tensors."""
    if _is_transposed(name, config):
        return "text_projection"
    if not name.startswith("text."):
        return name
    name = name.removeprefix("text.")
    if block := re.fullmatch(r"blocks\.(\d+)\.(\w+\.(?:(?:qkv|proj|fc1|fc2)\.)?)(\w+)", name):
        return f"text_transformer.resblocks.{block[1]}.{TEXT_BLOCK[block[2]]}{block[3]}"
    return re.sub(r"^norm\.", "ln_final.", re.sub(r"^projection\.", "text_projection.", name))


def _is_transposed(name: str, config: ResolvedModel) -> bool:
    """The official format stores the bias-free text projection as (in, out), for x @ P."""
    return name == "text.projection.weight" and not config.text.projection_bias


def _meta_state(config: ResolvedModel, objectives: AbstractSet[str]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return VTP(config, objectives=EXPORTED.keys() & objectives).state_dict()


def our_shapes(config: ResolvedModel, objectives: AbstractSet[str]) -> dict[str, list[int]]:
    """Return our name and shape of every tensor of a tokenizer with the towers of ``objectives``."""
    return {name: list(tensor.shape) for name, tensor in _meta_state(config, objectives).items()}


def official_shapes(
    config: ResolvedModel, objectives: AbstractSet[str] = OBJECTIVES, released: Mapping[str, Any] = NOTHING
) -> dict[str, list[int]]:
    """Return the official name and shape of every tensor of ``config``'s model."""
    ours = _meta_state(config, objectives)
    return {official_name(name, config): list(_official(name, ours[name], config, released).shape) for name in ours}


def _official(name: str, tensor: Tensor, config: ResolvedModel, released: Mapping[str, Any]) -> Tensor:
    """Return one of our tensors in its official shape."""
    is_scalar = name in SCALARS and released.get("nonscalar_logit_scale") is not True
    tensor = tensor.t() if _is_transposed(name, config) else tensor
    return tensor.reshape(()) if is_scalar else tensor.contiguous()


def objectives_of(names: AbstractSet[str]) -> frozenset[str]:
    """Return the objectives whose towers are among tensor ``names`` (ours or official)."""
    return frozenset(
        objective for objective, tower in EXPORTED.items() if any(name.startswith(tower) for name in names)
    )


def to_official(
    state: Mapping[str, Tensor], config: ResolvedModel, released: Mapping[str, Any] = NOTHING
) -> dict[str, Tensor]:
    """Convert our whole tensors to official ones: float32, the RoPE periods bfloat16.

    ``state`` may lack the periods (they follow from the config) and may hold the DINO head and the teacher, which
    are left out. For ``released`` see ``save_folder``. UserError lists all that is missing or has a wrong shape.
    """
    shapes, rope_dtype = our_shapes(config, objectives_of(state.keys())), DTYPES[config.rope_dtype]
    periods = {name: rope_periods(4 * shape[0], rope_dtype) for name, shape in shapes.items() if name.endswith(PERIODS)}
    whole = {**periods, **state}
    check({name: tensor for name, tensor in whole.items() if name in shapes}, shapes, "the model's weights")
    result = {}
    for name in shapes:
        tensor = whole[name].detach().to("cpu", torch.bfloat16 if name.endswith(PERIODS) else torch.float32)
        result[official_name(name, config)] = _official(name, tensor, config, released)
    return result


def from_official(
    tensors: Mapping[str, Tensor], config: ResolvedModel, objectives: AbstractSet[str] | None = None,
    released: Mapping[str, Any] = NOTHING,
) -> dict[str, Tensor]:
    """Convert official tensors to our names and to float32 (periods keep their own dtype).

    The towers of ``objectives`` must be there; None = those that are there. For ``released`` see ``save_folder``.
    UserError lists every missing, unexpected and misshapen tensor.
    """
    objectives = objectives_of(tensors.keys()) if objectives is None else objectives
    check(tensors, official_shapes(config, objectives, released), "the checkpoint")
    result = {}
    for name, shape in our_shapes(config, objectives).items():
        tensor = tensors[official_name(name, config)]
        tensor = tensor.to(DTYPES[config.rope_dtype] if name.endswith(PERIODS) else torch.float32)
        result[name] = (tensor.t() if _is_transposed(name, config) else tensor).contiguous().reshape(shape)
    return result


def load_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of ``folder/model.safetensors`` as they are. UserError if it is missing or corrupt."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing; {_REMEDY}")
    return read_safetensors(path, "download it again")


def load_folder(folder: str | Path) -> tuple[ResolvedModel, dict[str, Tensor]]:
    """Read the model config and, by our names, the tensors of an official folder. UserError if they do not fit."""
    data = read_released(folder)
    where = str(Path(folder) / "config.json")
    values, config = read_keys(data, where), config_from_official(data, where)
    flags = (("contrastive", values.train_clip), ("reconstruction", values.train_reconstruction))
    objectives = {name for name, is_on in flags if is_on}
    return config, from_official(load_tensors(folder), config, objectives, data)


def read_released(folder: str | Path) -> dict[str, Any]:
    """Read the ``config.json`` of an official folder as it is. Raises UserError."""
    return read_json(Path(folder) / "config.json", dict[str, Any], _REMEDY)


def save_folder(
    folder: str | Path, config: ResolvedModel, state: Mapping[str, Tensor], released: Mapping[str, Any] = NOTHING
) -> None:
    """Write an official folder from our whole tensors. UserError if the official format cannot express the model.

    ``released`` is the ``config.json`` of the folder that the model came from. What it says in other words (4 for 4.0)
    or beyond our settings is kept, so that the same files are written back.
    """
    folder = Path(folder)
    values = config_to_official(config, objectives_of(state.keys()))
    said = {key: released[key] for key in values if key in released}
    values |= {key: value for key, value in said.items() if key in _KEPT or value == values[key]}
    text = json.dumps(values, indent=2) + "\n"
    tensors = to_official(state, config, released)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Each file gets its name when it is whole. The config comes last, so a new folder that has one is complete.
        with replaced(folder / "model.safetensors") as partial:
            write_tensors(partial, tensors)
        write_atomic(folder / "config.json", text.encode(), flush=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error}); choose another folder or free some space") from None
