"""A tokenizer on disk, in whichever form: a run's checkpoint or the released models' folder."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.formats.fingerprint import encoder_fingerprint
from megavtp.checkpoint.formats.hf_vtp import PERIODS, load_folder, objectives_of, our_shapes, read_released
from megavtp.checkpoint.kind import is_dit
from megavtp.checkpoint.reading import INDEX, Checkpoint, is_checkpoint, open_checkpoint
from megavtp.config.schema import (
    Config,
    ContrastiveConfig,
    DataConfig,
    ObjectivesConfig,
    ReconstructionConfig,
    SelfDistillationConfig,
)
from megavtp.config.sizes import ResolvedConfig, ResolvedModel
from megavtp.config.validate import check_stored
from megavtp.errors import UserError
from megavtp.json_file import check_form
from megavtp.latents import artifact as artifact_file
from megavtp.latents.artifact import TokenizerArtifact
from megavtp.models.build import load_full
from megavtp.models.fitting import check
from megavtp.models.vtp import VTP
from megavtp.nn.rope import DTYPES, AxialRope, rope_periods

CAPTION_FILES = ("captions.model", "captions.txt.gz")  # beside the weights: sentencepiece, or CLIP's merges
TRAINING_ONLY = ("teacher.", "dino_head.")  # no place in the released form


@dataclass(frozen=True)
class VTPSource:
    """What was read.

    Attributes:
        config: the run's; of a released model only ``model``, ``data.captions`` and which objectives are on.
        tensors: whole tensors by our names, on the host, read from disk when used; the teacher included.
        artifact: the one beside the weights, or made from them.
        captions: "clip", or the caption tokenizer's file, which need not exist; None = no text encoder.
        step: of the run.
        released: the ``config.json`` of the released folder that these weights came from, if any.
    """

    path: Path
    config: ResolvedConfig
    tensors: dict[str, Tensor]
    artifact: TokenizerArtifact
    captions: str | Path | None
    step: int = 0
    released: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizer_tensors(self) -> dict[str, Tensor]:
        """Without what only training needs."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(TRAINING_ONLY)}


def open_vtp(path: str | Path, form: str | None = None) -> VTPSource:
    """Read a tokenizer: a checkpoint of a run (its hashes are compared) or a released model's folder.

    ``form``: "native" or "hf-vtp", where a folder has the files of both; None = native, if it is one.

    Raises:
        UserError: it is neither, is damaged, does not fit its own config, or has an artifact of other weights.
    """
    path = Path(path)
    if form == "native" or (form is None and is_checkpoint(path)):
        with open_checkpoint(path) as checkpoint:
            path = checkpoint.path
            config, tensors, step = _read_native(checkpoint)
            where = f"{path / INDEX}: released"
            released = check_form(checkpoint.meta.get("released", {}), dict[str, Any], where, "use another checkpoint")
    elif form == "hf-vtp" or (path / "config.json").is_file():
        model, tensors = load_folder(path)
        config, step = released_config(model, objectives_of(tensors.keys())), 0
        released = read_released(path)
    else:
        raise UserError(
            f"{path} is no tokenizer: give the folder with {INDEX} (RUN/checkpoints/latest), or that of a released "
            "model with config.json and model.safetensors"
        )
    captions = find_captions(path, config.data) if "contrastive" in objectives_of(tensors.keys()) else None
    artifact = _artifact(path, config.model, tensors, captions)
    return VTPSource(path, config, tensors, artifact, captions, step, released)


def _read_native(checkpoint: Checkpoint) -> tuple[ResolvedConfig, dict[str, Tensor], int]:
    if is_dit(checkpoint):
        raise UserError(
            f"{checkpoint.path} holds a DiT, no tokenizer: give a checkpoint of a VTP run, or a released model's folder"
        )
    names = [name.removeprefix("model/") for name in checkpoint.names if name.startswith("model/")]
    if "trunk.cls_token" not in names:
        raise UserError(f"{checkpoint.path} is no tokenizer's checkpoint (it has no trunk); give one of a VTP run")
    config = checkpoint.config(Config, check_stored)
    objectives = objectives_of(set(names))
    if "contrastive" in objectives and config.model.text.vocab_size is None:
        raise UserError(f"{checkpoint.path}: its configuration lacks model.text.vocab_size; use another checkpoint")
    tensors = {name: checkpoint.tensor(f"model/{name}") for name in names}
    # A model of this configuration takes no more memory than the file, then.
    shapes = {name: shape for name, shape in our_shapes(config.model, objectives).items() if not name.endswith(PERIODS)}
    check({name: t for name, t in tensors.items() if not name.startswith(TRAINING_ONLY)}, shapes, str(checkpoint.path))
    return config, tensors, checkpoint.step


def released_config(model: ResolvedModel, objectives: AbstractSet[str]) -> ResolvedConfig:
    """The configuration that says of a model without a run what is known: its towers; and CLIP's captions."""
    on = ObjectivesConfig()
    return ResolvedConfig(
        model=model, data=DataConfig(captions="clip"),
        objectives=ObjectivesConfig(
            contrastive=on.contrastive if "contrastive" in objectives else ContrastiveConfig(weight=0.0),
            self_distillation=SelfDistillationConfig(weight=0.0),
            reconstruction=on.reconstruction if "reconstruction" in objectives else ReconstructionConfig(weight=0.0),
        ),
    )


def captions_beside(path: str | Path) -> Path | None:
    """The caption tokenizer's file that a converted tokenizer carries along, if it has one of its own."""
    return next((Path(path) / name for name in CAPTION_FILES if (Path(path) / name).is_file()), None)


def find_captions(path: str | Path, data: DataConfig) -> str | Path:
    """The caption tokenizer of the model at ``path``: the file beside it, else the one its run names."""
    beside = captions_beside(path)
    if beside is not None or data.captions == "clip":
        return beside or "clip"
    return Path(data.root, "captions.model") if data.captions == "auto" else Path(data.captions)


def _artifact(
    path: Path, model: ResolvedModel, tensors: dict[str, Tensor], captions: str | Path | None
) -> TokenizerArtifact:
    fingerprint, name = encoder_fingerprint(model, tensors), None if captions is None else Path(captions).name
    if not (path / artifact_file.FILE).is_file():
        return TokenizerArtifact(
            fingerprint, model.image_size, model.patch_size, model.bottleneck, captions=name
        )
    found = TokenizerArtifact.read(path)
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{path / artifact_file.FILE} belongs to other weights than those beside it (fingerprint "
            f"{found.fingerprint[:12]}, not {fingerprint[:12]}); convert the tokenizer again, or remove that file"
        )
    if (found.patch_size, found.latent_channels) != (model.patch_size, model.bottleneck):
        raise UserError(
            f"{path / artifact_file.FILE} has other patches or latent channels than the model beside it; convert the "
            "tokenizer again, or remove that file"
        )
    return replace(found, captions=name)


def check_periods(source: VTPSource) -> None:
    """UserError if a stored RoPE table is not the one that the config gives: a run's checkpoint does not keep it."""
    dtype = DTYPES[source.config.model.rope_dtype]
    for name, periods in source.tensors.items():
        if name.endswith(PERIODS) and not torch.equal(periods, rope_periods(4 * len(periods), dtype)):
            raise UserError(f"{source.path}: {name} is not the RoPE table of its config; it has no native form")


def build_tokenizer(
    source: VTPSource, device: torch.device | str, compute_dtype: torch.dtype = torch.float32
) -> VTP:
    """The tokenizer's towers, filled, in eval mode; memory for nothing else is taken."""
    tensors = source.tokenizer_tensors
    with torch.device("meta"):
        model = VTP(source.config.model, objectives=objectives_of(tensors.keys()), compute_dtype=compute_dtype)
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, AxialRope):
            module.reset_periods()
    load_full(model, tensors)
    return model.eval().requires_grad_(False)
