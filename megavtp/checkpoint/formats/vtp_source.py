"""This reads a tokenizer from disk in either format: the checkpoint of a run or the folder of a released model."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.formats.fingerprint import encoder_fingerprint
from megavtp.checkpoint.formats.hf_vtp import PERIODS, load_folder, objectives_of, our_shapes, read_released
from megavtp.checkpoint.kind import is_dit
from megavtp.checkpoint.reading import INDEX, Checkpoint, is_checkpoint, open_checkpoint
from megavtp.config.schema import Config, DataConfig, ObjectivesConfig
from megavtp.config.sizes import ResolvedConfig, ResolvedModel
from megavtp.config.validate import check_stored
from megavtp.errors import UserError
from megavtp.json_file import check_form
from megavtp.latents import artifact as artifact_file
from megavtp.latents.artifact import TokenizerArtifact
from megavtp.models.build import load_full
from megavtp.models.fitting import check
from megavtp.models.vtp import VTP
from megavtp.nn.rope import DTYPES, reset_rope, rope_periods

CAPTION_FILES = ("captions.model", "captions.txt.gz")  # beside the weights: sentencepiece, or CLIP's merges
# The released format has no place for these.
TRAINING_ONLY = ("teacher.", "dino_head.", "discriminator.", "averaged_decoder.")


@dataclass(frozen=True)
class VTPSource:
    """A tokenizer that was read.

    Attributes:
        config: that of the run; a released model gives only ``model``, ``data.captions`` and which objectives are on.
        tensors: whole tensors by our names in host memory, including the teacher; they are read from disk when used.
        artifact: the one beside the weights, or one made from them.
        captions: "clip", or the caption tokenizer's file, which need not exist; None without a text encoder.
        step: the step of the run.
        released: the ``config.json`` of the released folder that the weights came from, if there is one.
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
        """The tensors without those that only training needs; the decoder is its average, where the run kept one."""
        kept = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(TRAINING_ONLY)}
        average = "averaged_decoder."
        averaged = {name: tensor for name, tensor in self.tensors.items() if name.startswith(average)}
        return kept | {f"pixel_decoder.{name.removeprefix(average)}": tensor for name, tensor in averaged.items()}


def open_vtp(path: str | Path, form: str | None = None, opened: Checkpoint | None = None) -> VTPSource:
    """Read a tokenizer from the checkpoint of a run, whose hashes are compared, or from a released model's folder.

    ``form`` is "native" or "hf-vtp", for a folder that has the files of both; None prefers native. ``opened`` is the
    run's checkpoint if it is open already; it stays open.

    Raises:
        UserError: it is neither, is damaged, does not fit its own config, or has an artifact of other weights.
    """
    path = Path(path)
    if opened is not None or form == "native" or (form is None and is_checkpoint(path)):
        with nullcontext(opened) if opened is not None else open_checkpoint(path) as checkpoint:
            path, step = checkpoint.path, checkpoint.step
            config, tensors = _read_native(checkpoint)
            where = f"{path / INDEX}: released"
            released = check_form(checkpoint.meta.get("released", {}), dict[str, Any], where, "use another checkpoint")
    elif form == "hf-vtp" or (path / "config.json").is_file():
        model, tensors = load_folder(path)
        step, released, on = 0, read_released(path), ObjectivesConfig()
        off = {name for name in vars(on) if name not in objectives_of(tensors.keys())}
        objectives = replace(on, **{name: replace(getattr(on, name), weight=0.0) for name in off})
        # In place of a run's configuration: which objectives were on, and that CLIP's captions were used.
        config = ResolvedConfig(model=model, data=DataConfig(captions="clip"), objectives=objectives)
    else:
        raise UserError(
            f"{path} is no tokenizer: give the folder with {INDEX} (RUN/checkpoints/latest), or that of a released "
            "model with config.json and model.safetensors"
        )
    captions = find_captions(path, config.data) if "contrastive" in objectives_of(tensors.keys()) else None
    artifact = _artifact(path, config.model, tensors, captions)
    return VTPSource(path, config, tensors, artifact, captions, step, released)


def _read_native(checkpoint: Checkpoint) -> tuple[ResolvedConfig, dict[str, Tensor]]:
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
    # This ensures that a model of this configuration takes no more memory than the file.
    shapes = {name: shape for name, shape in our_shapes(config.model, objectives).items() if not name.endswith(PERIODS)}
    check({name: t for name, t in tensors.items() if not name.startswith(TRAINING_ONLY)}, shapes, str(checkpoint.path))
    return config, tensors


def captions_beside(path: str | Path) -> Path | None:
    """Return the caption tokenizer's file that lies beside a converted tokenizer, if there is one."""
    return next((file for name in CAPTION_FILES if (file := Path(path, name)).is_file()), None)


def find_captions(path: str | Path, data: DataConfig) -> str | Path:
    """Return the caption tokenizer of the model at ``path``: the file beside it, else the one that its run names."""
    beside = captions_beside(path)
    if beside is not None or data.captions == "clip":
        return beside or "clip"
    return Path(data.root, "captions.model") if data.captions == "auto" else Path(data.captions)


def _artifact(
    path: Path, model: ResolvedModel, tensors: dict[str, Tensor], captions: str | Path | None
) -> TokenizerArtifact:
    fingerprint, name = encoder_fingerprint(model, tensors), None if captions is None else Path(captions).name
    file = path / artifact_file.FILE
    if not file.is_file():
        return TokenizerArtifact(fingerprint, model.image_size, model.patch_size, model.bottleneck, captions=name)
    found, remedy = TokenizerArtifact.read(path), "convert the tokenizer again, or remove that file"
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{file} belongs to other weights than those beside it (fingerprint {found.fingerprint[:12]}, not "
            f"{fingerprint[:12]}); {remedy}"
        )
    if (found.patch_size, found.latent_channels) != (model.patch_size, model.bottleneck):
        raise UserError(f"{file} has other patches or latent channels than the model beside it; {remedy}")
    return replace(found, captions=name)


def check_periods(source: VTPSource) -> None:
    """Raise UserError if a stored RoPE table is not the config's: a run's checkpoint could not keep it."""
    dtype = DTYPES[source.config.model.rope_dtype]
    for name, periods in source.tensors.items():
        if name.endswith(PERIODS) and not torch.equal(periods, rope_periods(4 * len(periods), dtype)):
            raise UserError(f"{source.path}: {name} is not the RoPE table of its config; it has no native form")


def build_tokenizer(source: VTPSource, device: torch.device | str, compute_dtype: torch.dtype = torch.float32) -> VTP:
    """Build the tokenizer's towers with their weights, in eval mode; nothing else takes memory."""
    tensors = source.tokenizer_tensors
    with torch.device("meta"):
        model = VTP(source.config.model, objectives=objectives_of(tensors.keys()), compute_dtype=compute_dtype)
    model.to_empty(device=device)
    reset_rope(model)
    load_full(model, tensors)
    return model.eval().requires_grad_(False)
