"""This evaluates a checkpoint of a run or a released model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavtp.checkpoint.formats.vtp_source import build_tokenizer, captions_beside, open_vtp
from megavtp.checkpoint.once import opened_once
from megavtp.checkpoint.reading import Checkpoint
from megavtp.config.schema import Config
from megavtp.data.captions import CaptionTokenizer, load_tokenizer
from megavtp.data.files import refuse_hub_id
from megavtp.data.loader import EvalDataset
from megavtp.data.shards import ShardDataset, open_dataset, split_folder, split_folders
from megavtp.errors import UserError
from megavtp.evaluation.distances.network import FeatureNetwork
from megavtp.evaluation.probes.labelled import probe_labels
from megavtp.evaluation.tokenizer.interface import NoCaptions, Perceptual, VTPEvaluated
from megavtp.evaluation.tokenizer.suite import evaluate
from megavtp.models.build import build_vtp
from megavtp.models.lpips import LPIPS, PERCEPTUAL_NETS
from megavtp.models.lpips_weights import load_lpips_weights
from megavtp.models.vtp import VTP
from megavtp.parallel.collectives import together
from megavtp.parallel.looking import look_once
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.pixels import normalise, to_uint8


def open_model(path: str | Path, device: torch.device, opened: Checkpoint | None = None) -> tuple[VTP, Config]:
    """Open a tokenizer's towers, which all metrics use, and its config, from a run's checkpoint or a released model.

    ``opened`` is the run's checkpoint if it is open already; it stays open. A released model has only its model config,
    and CLIP's caption tokenizer. One beside the weights, where a conversion puts it, has priority over both. Raises
    ``UserError``, see ``open_vtp``.
    """
    source = open_vtp(refuse_hub_id(path), opened=opened)
    config = source.config
    if beside := captions_beside(path):
        config = replace(config, data=replace(config.data, captions=str(beside)))
    return build_tokenizer(source, device), config


def find_tokenizer(model: VTP, config: Config, data: Path, spec: str | None) -> CaptionTokenizer:
    """Load the caption tokenizer of the model: ``spec``, else the run's, whose data set may have moved.

    Raises ``UserError`` if its vocabulary is not the model's.
    """
    if "contrastive" not in model.objectives:
        return NoCaptions()
    spec = spec or config.data.captions
    trained_on = Path(config.data.root)
    root = trained_on if (trained_on / "captions.model").is_file() else data
    tokenizer = load_tokenizer(spec, root, model.config.text.context_length)
    if tokenizer.vocab_size != model.config.text.vocab_size:
        source = root / "captions.model" if spec == "auto" else spec
        raise UserError(
            f"the caption tokenizer {source} has {tokenizer.vocab_size} ids, the model "
            f"{model.config.text.vocab_size}: name the one it was trained with by --captions"
        )
    return tokenizer


def find_perceptual(config: Config, device: torch.device, skipped: dict[str, str]) -> dict[str, Perceptual]:
    """Load LPIPS with the network of the run's loss, else VGG; ``skipped`` gets the reason if that is impossible."""
    settings = config.objectives.reconstruction
    net = PERCEPTUAL_NETS.get(settings.perceptual, "vgg")
    path = settings.perceptual_weights if settings.perceptual != "none" else None
    try:
        return {f"lpips_{net}": LPIPS(net, load_lpips_weights(net, path)).to(device)}
    except UserError as error:
        skipped[f"reconstruction/lpips_{net}"] = str(error)
        return {}


@dataclass
class CheckpointEvaluation:
    """Evaluates a checkpoint on a data set with splits.

    ``captions`` replaces the run's caption tokenizer; ``max_samples``, ``batch_size`` and ``templates`` replace its
    ``evaluation`` settings. ``frechet`` is a network for the Frechet distance of reconstructions, which takes time; so
    do ``probes``, see ``evaluate``. The processes of ``mesh`` share the samples; each has the whole model. All make it
    together, and rank 0 alone looks at the files. UserError on all ranks.
    """

    checkpoint: Path
    data: Path
    split: str = "test"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    captions: str | None = None
    max_samples: int | None = None
    batch_size: int | None = None
    templates: tuple[str, ...] | None = None
    frechet: FeatureNetwork | None = None
    probes: Sequence[str] = ()
    mesh: Mesh = SINGLE
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # This finds a missing data set before the model is loaded.
        folder = look_once(lambda: open_dataset(split_folder(self.data, self.split)))
        train_folder = None if self.split == "train" else look_once(self._open_train)
        with opened_once(self.checkpoint) as opened:
            together(lambda: self._load(opened, folder, train_folder))

    def _open_train(self) -> ShardDataset | None:
        found = split_folders(self.data).get("train")
        return None if found is None else open_dataset(found)

    def _load(self, opened: Checkpoint | None, folder: ShardDataset, train_folder: ShardDataset | None) -> None:
        self.model, self.config = open_model(self.checkpoint, self.device, opened)
        given = {k: v for k in ("max_samples", "batch_size", "templates") if (v := getattr(self, k)) is not None}
        self.settings = replace(self.config.evaluation, **given)
        if self.probes:
            self._check_probes(train_folder, folder)
        self.tokenizer = find_tokenizer(self.model, self.config, self.data, self.captions)
        self.test_set = self._samples(folder, self.settings.max_samples)
        self.train_set = self._samples(train_folder, self.settings.max_samples) if train_folder else None
        has_decoder = "reconstruction" in self.model.objectives
        self._perceptual = find_perceptual(self.config, self.device, self.skipped) if has_decoder else {}

    def _samples(self, folder: ShardDataset, count: int) -> EvalDataset:
        return EvalDataset(folder, self.tokenizer, self.model.config.image_size, count, self.config.data.max_pixels)

    def _check_probes(self, train: ShardDataset | None, test: ShardDataset) -> None:
        """Raise ``UserError`` for probes that are impossible, before hours are spent on the features."""
        if "latents" in self.probes and "reconstruction" not in self.model.objectives:
            raise UserError(f"--probe latents: {self.checkpoint} has no latents (reconstruction objective off)")
        if train is None:
            raise UserError(
                f"--probe: {self.data} has no train split other than the measured one, {self.split}, to learn from"
            )
        size, count = self.model.config.image_size, self.settings.max_samples
        sets = (EvalDataset(data, NoCaptions(), size, count, self.config.data.max_pixels) for data in (train, test))
        probe_labels(*(samples.metadata() for samples in sets))

    def metrics(self, model: VTP, details: dict[str, Any] | None = None) -> dict[str, float]:
        """Compute every metric of ``model``, the checkpoint's or one of its architecture, in a collective call.

        ``details`` gets what is no single number, see ``evaluate``.
        """
        evaluated = VTPEvaluated(model, model.objectives, model.config.vision.depth)
        return evaluate(
            evaluated, self.test_set, self.train_set, self.settings, self.mesh, tokenizer=self.tokenizer,
            device=self.device, perceptual=self._perceptual, skipped=self.skipped, frechet=self.frechet,
            probes=self.probes, details=details, quiet=self.mesh.rank > 0,
        )

    def untrained(self) -> VTP:
        """Build a freshly initialised model of the checkpoint's architecture with the run's seed."""
        model = self.model
        return build_vtp(model.config, objectives=model.objectives, seed=self.config.seed, device=self.device)

    def reconstructions(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` images spread over the split and their reconstructions, both uint8 (n, 3, H, W)."""
        if "reconstruction" not in self.model.objectives:
            raise UserError(f"--pictures: {self.checkpoint} has no pixel decoder (reconstruction objective off)")
        images = [b["image"] for b in self._samples(self.test_set.dataset, count).batches(count, 0, 1)]
        if not images:
            raise UserError(f"--pictures: {self.data / self.split} has no sample that can be read")
        inputs = torch.cat(images)
        with torch.no_grad():
            output = self.model("reconstruction", images=normalise(inputs.to(self.device)))
        return inputs, to_uint8(output).cpu()
