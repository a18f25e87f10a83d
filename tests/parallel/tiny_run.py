"""A tiny pre-training set-up with all three objectives, for equivalence tests on any layout."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megavtp.config.load import from_dict, merged
from megavtp.config.run import ParallelConfig
from megavtp.config.schema import Config
from megavtp.config.share import share
from megavtp.config.sizes import adversarial_starts
from megavtp.config.validate import validate
from megavtp.data.batch import Batch, StepDataset
from megavtp.decoder import passes as decoder_passes
from megavtp.decoder.recipe import build_features, model_kind
from megavtp.decoder.recipe import build_passes as build_decoder_passes
from megavtp.models import discriminator
from megavtp.models.discriminator import Discriminator
from megavtp.models.feature_networks import FeatureNetwork, OwnFeatures
from megavtp.models.vtp import VTP
from megavtp.nn.block import Block
from megavtp.nn.compiling import compile_networks
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.passes import Pass, execute
from megavtp.pixels import denormalise
from megavtp.pretraining import recipe
from megavtp.pretraining.passes import build_passes
from megavtp.training.optimizer import build_optimizer, tower_of

TOWER = {"width": 32, "depth": 2, "heads": 4}
BASE = {
    "seed": 3,
    "model": {
        # bfloat16 tables would turn a difference in the last bit of float32 into one of the eighth.
        "rope_dtype": "float32", "size": "tiny", "image_size": 32, "bottleneck": 8, "init_logit_scale": 1.0,
        "vision": TOWER, "decoder": {**TOWER, "depth": 1},
        "text": {**TOWER, "depth": 1, "context_length": 8, "vocab_size": 64},
        "dino_head": {"prototypes": 48, "hidden": 32, "bottleneck": 16},
    },
    "objectives": {
        "contrastive": {"drop_path": 0.0},
        "self_distillation": {
            "batch": 8, "drop_path": 0.3, "teacher_momentum": 0.9, "chunk": 16, "freeze_last_layer": 0.25,
            # Softer than the default: with random weights a sharp target would magnify rounding.
            "student_temperature": 0.4, "teacher_temperature": 0.3, "teacher_temperature_start": 0.2,
        },
        # The share is one that leaves no two nearest neighbours equally near in any step: there KoLeo's gradient would
        # hang on rounding.
        "reconstruction": {
            "batch": 8, "weight": 10.0, "perceptual": "none", "latent_noise": 0.5, "latent_noise_share": 0.4,
        },
    },
    "data": {
        "streams": 4, "workers": 0, "shuffle_block": 8,
        "augment": {"global_size": 32, "local_size": 16, "local_crops": 2, "flip": 0.5},
    },
    "parallel": {"precision": "fp32"},
    # A large epsilon: plain Adam turns the rounding noise of gradients that are zero in theory into full-size updates.
    "train": {
        "steps": 4, "batch_size": 16,
        "optimizer": {"lr": 0.005, "warmup_steps": 1, "eps": 1e-2, "clip_grad": 0.5, "lr_scale": {"decoder": 0.5}},
    },
}


# A pixel on the edge between two 8-bit values would jump with the last bit of float32.
decoder_passes.to_uint8 = lambda images: denormalise(images.float()).clamp(0, 1) * 255
# And so would the slope of an activation at its kink.
discriminator.activation = lambda x: 0.6 * x + 0.4 * (x.square() + 0.01).sqrt()


def tiny_config(extra: dict | None = None, world_size: int | None = None) -> Config:
    return validate(from_dict(merged(BASE, extra or {}), Config), world_size)


@dataclass(frozen=True)
class Sample:
    image: bytes
    caption: str
    id: str


def blurred_picture(rng: np.random.Generator, stark: bool = False) -> bytes:
    """A smooth random 40 x 36 picture, as PNG. ``stark``: each channel is either dark or bright all over."""
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    if stark:
        coarse = coarse // 4 + 192 * rng.integers(0, 2, 3, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((36, 40), Image.BILINEAR).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class FakeData:
    """Twenty-four pictures in two shards."""

    stark: bool = False
    shard_counts = (14, 10)

    def read(self, shard: int, row: int) -> Sample:
        picture = blurred_picture(np.random.default_rng(100 * shard + row), self.stark)
        return Sample(picture, f"caption {shard} {row}", f"{shard}/{row}")


class FakeTokenizer:
    vocab_size = 64

    def encode(self, captions: list[str]) -> Tensor:
        tokens = torch.zeros(len(captions), 8, dtype=torch.long)
        for i, caption in enumerate(captions):
            _, shard, row = caption.split()
            tokens[i, :4] = torch.tensor([62, 1 + int(shard), 5 + int(row), 63])
        return tokens


class PlainRunner:
    """The single-process reference: torch alone, no engine."""

    def __init__(self, module: VTP, optimizer: torch.optim.Optimizer, clip_grad: float):
        self.module, self.optimizer, self.clip_grad, self.mesh = module, optimizer, clip_grad, SINGLE

    def __call__(self, mode: str, **inputs):
        return self.module(mode, **inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def begin_step(self) -> None:
        self.optimizer.zero_grad()

    def set_lr(self, lr_of: Callable[[dict], float]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_of(group)

    def step(self) -> dict[str, float]:
        """Update; gradient norms before clipping: of each tower, and of "all"."""
        towers: dict[str, list[Tensor]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                towers.setdefault(tower_of(name), []).append(parameter.grad.flatten())
        norms = {tower: float(torch.cat(parts).double().norm()) for tower, parts in towers.items()}
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norms["all"] = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad or float("inf")))
        self.optimizer.step()
        return norms


def build_model(config: Config, mesh: Mesh) -> VTP:
    cpu, kind = torch.device("cpu"), VTP
    if config.objectives.reconstruction.frozen_encoder:
        kind = model_kind(config, _features(config))
    model = recipe.build_model(config, share(config, mesh.dp), mesh, cpu, kind=kind)
    _condition(model, _keeps_apart(config))
    compile_networks(config.parallel.compile, cpu, model)
    return model


def _features(config: Config) -> FeatureNetwork | None:
    return build_features(config, torch.device("cpu")) if config.objectives.adversarial.weight else None


def _filled_features(config: Config) -> FeatureNetwork | None:
    """The discriminator's features, of the encoder that every layout starts with."""
    features = _features(config)
    if isinstance(features, OwnFeatures):
        trunk = build_model(plain_layout(config), SINGLE).trunk
        features.load(dict(trunk.named_parameters()), torch.device("cpu"))
    compile_networks(config.parallel.compile, torch.device("cpu"), features)
    return features


def _keeps_apart(config: Config) -> bool:
    """Whether pictures are stark and predictions near grey.

    The slope of L1 jumps where a prediction meets its pixel: of 50,000, rounding would move one across now and then.
    """
    return config.objectives.reconstruction.l1_weight > 0


@torch.no_grad()
def _condition(model: VTP, near_grey: bool) -> None:
    """Make activations of order one; of the predicted pixels, if not ``near_grey``.

    The initial std of 0.02 is meant for widths near 1000. At width 32 all features would be nearly parallel, and
    normalising them would magnify rounding a hundredfold.
    """
    for name, parameter in model.named_parameters():
        if near_grey and name == "pixel_decoder.proj_out.weight":
            continue
        if name.endswith("mask_token"):  # zero at the start: RMSNorm's gradient there is 1 / sqrt(eps)
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).cos().view_as(parameter))
        elif name.endswith(("token_embedding.weight", "positional_embedding", "cls_token")):
            parameter.mul_(40)
        elif parameter.ndim > 1 and not name.startswith("text."):  # whose values go by the width
            parameter.mul_(6)


def optimizer_of(model: VTP, config: Config) -> torch.optim.Optimizer:
    return build_optimizer(model.named_parameters(), config.train.optimizer, max_logit_scale=model.max_logit_scale)


def build_engine(config: Config, mesh: Mesh) -> tuple[Engine, VTP]:
    model = build_model(config, mesh)
    return recipe.build_engine(model, config, mesh, (Block, Discriminator)), model


def passes_of(config: Config, mesh: Mesh) -> list[Pass]:
    """The passes; where the config wants a perceptual distance, the mean square serves as one."""
    wanted = config.objectives.reconstruction.perceptual != "none"
    distance = (lambda a, b: (a - b).square().mean((1, 2, 3))) if wanted else None
    shares, device = share(config, mesh.dp), torch.device("cpu")
    if config.objectives.reconstruction.frozen_encoder:
        return build_decoder_passes(config, shares, mesh, device, distance, _filled_features(config))
    return build_passes(config, shares, mesh, device, distance)


def data_of(config: Config, mesh: Mesh) -> Callable[[int], Batch]:
    """Step -> this rank's share. Kept for the life of the process: what shares dp and all that decides data sees the
    same batches."""
    data = StepDataset(FakeData(_keeps_apart(config)), FakeTokenizer(), config, mesh.dp_rank, mesh.dp)
    sizes = (config.train.batch_size, config.model.image_size, config.model.patch_size, mesh.dp, mesh.dp_rank)
    kept = _BATCHES.setdefault(repr((config.seed, config.data, plain_layout(config).objectives, sizes)), {})

    def batch(step: int) -> Batch:
        if step not in kept:
            kept[step] = data[step]
        return kept[step]

    return batch


_BATCHES: dict[str, dict[int, Batch]] = {}


def learning_rate(config: Config, step: int) -> Callable[[dict], float]:
    """Step -> group -> its rate, with what is frozen at first."""
    o, steps = config.objectives, config.train.steps
    prototypes = step < o.self_distillation.freeze_last_layer * steps
    not_started = step < adversarial_starts(config)[0]

    def rate(group: dict) -> float:
        is_frozen = (prototypes and group["prototypes"]) or (not_started and group["tower"] == "discriminator")
        return 0.0 if is_frozen else config.train.optimizer.lr * group["lr_scale"]

    return rate


def follow(config: Config) -> float:
    """How far an average moves in a step."""
    o = config.objectives
    second = o.reconstruction.frozen_encoder
    return 1 - (o.reconstruction.decoder_momentum if second else o.self_distillation.teacher_momentum)


@dataclass
class Outcome:
    """Of a run: per step the loss terms, averaged over dp, and the gradient norms (of "all" and of each tower); the
    final weights, whole, by name."""

    terms: list[dict[str, float]] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def reference(config: Config) -> Outcome:
    """By plain torch on one process."""
    model = build_model(config, SINGLE)
    runner = PlainRunner(model, optimizer_of(model, config), config.train.optimizer.clip_grad)
    data, passes, terms, norms = data_of(config, SINGLE), passes_of(config, SINGLE), [], []
    for step in range(config.train.steps):
        runner.set_lr(learning_rate(config, step))
        runner.begin_step()
        found = {}
        for objective in passes:
            found |= execute(objective, runner, data(step))
        terms.append({name: float(value) for name, value in found.items()})
        norms.append(runner.step())
        with torch.no_grad():
            for teacher, student in model.averaged():
                teacher.lerp_(student, follow(config))
    return Outcome(terms, norms, {name: p.detach().clone() for name, p in model.named_parameters()})


def plain_layout(config: Config) -> Config:
    """The same run on one process without engine options."""
    objectives = config.objectives
    whole = {
        name: replace(getattr(objectives, name), micro_batch=None)
        for name in ("contrastive", "self_distillation", "reconstruction")
    }
    parallel = ParallelConfig(precision=config.parallel.precision)
    return replace(config, parallel=parallel, objectives=replace(objectives, **whole))
