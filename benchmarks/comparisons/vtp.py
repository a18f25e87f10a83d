"""A step of each of VTP's objectives beside the official model: forward, loss, backward, clipping, update.

The official repository has the model and no training. Around it, the losses are written as their papers have them.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.comparisons.comparison import LR, Pair, Setting, step_of, steps_differ
from benchmarks.comparisons.perceptual import both_networks
from benchmarks.prototypes import TEMPERATURE, plain_loss
from benchmarks.step import make_batch
from megavtp.checkpoint.formats.hf_vtp import from_official
from megavtp.checkpoint.formats.hf_vtp_config import FRAME, config_to_official
from megavtp.checkpoint.formats.initial import fill
from megavtp.config.load import from_dict
from megavtp.config.schema import Config
from megavtp.config.share import share
from megavtp.config.sizes import GLOBAL_CROPS, ResolvedConfig
from megavtp.config.validate import validate
from megavtp.data.batch import Batch, masked_rows
from megavtp.models.vtp import OBJECTIVES
from megavtp.nn.compiling import compile_networks
from megavtp.parallel.mesh import build_mesh
from megavtp.pixels import denormalise, normalise
from megavtp.pretraining.passes import build_passes
from megavtp.pretraining.recipe import build_engine, build_model
from megavtp.training.step import train_step

Loss = Callable[[], Tensor]


@contextmanager
def official(setting: Setting, objective: str) -> Iterator[Pair]:
    from vtp.models.vtp_hf import VTPConfig, VTPModel

    config = vtp_config(setting, objective)
    batch, mesh = make_batch(config, setting.device.type == "cuda"), build_mesh(1, 1)
    follow = 1 - config.objectives.self_distillation.teacher_momentum
    released = config_to_official(config.model, {objective})
    model = VTPModel(VTPConfig(**{key: value for key, value in released.items() if key not in FRAME}))
    weights = from_official(model.state_dict(), config.model)
    trained, our_perceptual, average = nn.ModuleList([model.to(setting.device).train()]), None, None
    if objective == "contrastive":
        loss = contrastive_loss(model, batch, setting)
    elif objective == "reconstruction":
        our_perceptual, perceptual = both_networks(setting)
        loss = reconstruction_loss(model, perceptual, batch, setting)
    else:
        head, teacher_head = (dino_head(config).to(setting.device) for _ in range(2))
        teacher_head.load_state_dict(head.state_dict())
        trained.append(head)
        weights |= {f"dino_head.{name}": tensor for name, tensor in head.state_dict().items()}
        loss, average = self_distillation(model.trunk, head, teacher_head, batch, setting, follow)
    their_step = step_of(trained, loss, config.train.optimizer, average)

    ours = build_model(config, share(config, 1), mesh, setting.device)
    compile_networks(config.parallel.compile, setting.device, ours, our_perceptual)
    fill(ours, weights)
    engine = build_engine(ours, config, mesh)
    passes = build_passes(config, share(config, 1), mesh, setting.device, our_perceptual)

    def our_step() -> Tensor:
        terms, _ = train_step(
            engine, passes, batch, lr_of=lambda group: LR, averaged=ours.averaged(), follow=follow
        )
        return torch.stack(list(terms.values())).sum()  # all weights are 1

    with closing(engine):
        yield Pair(work(config, objective), our_step, their_step, steps_differ(our_step, their_step))


def vtp_config(setting: Setting, objective: str) -> ResolvedConfig:
    width, depth, heads = setting.size((32, 2, 2), (384, 4, 6), (768, 12, 12))
    tower = {"width": width, "depth": depth, "heads": heads}
    image, batch, crops = setting.size((32, 4, (32, 16, 2)), (256, 8, (224, 96, 8)), (256, 64, (224, 96, 8)))
    vocabulary, prototypes = setting.size((512, 64), (49408, 16384), (49408, 65536))
    weights = {name: {"weight": float(name == objective)} for name in OBJECTIVES}
    return validate(from_dict({
        "model": {
            "image_size": image, "vision": tower, "decoder": tower, "text": tower | {"vocab_size": vocabulary},
            "dino_head": {"prototypes": prototypes},
        },
        "objectives": {
            "contrastive": weights["contrastive"],
            "self_distillation": weights["self_distillation"] | {
                "batch": batch, "drop_path": 0.0, "koleo_weight": 0.0, "teacher_temperature": TEMPERATURE,
                "teacher_temperature_start": TEMPERATURE, "freeze_last_layer": 0.0,
            },
            "reconstruction": weights["reconstruction"] | {"batch": batch},
        },
        "data": {"streams": 1, "augment": dict(zip(("global_size", "local_size", "local_crops"), crops))},
        "train": {"batch_size": batch},
        "parallel": {"precision": setting.precision, "zero_stage": 0},
    }, Config), 1)


def work(config: ResolvedConfig, objective: str) -> str:
    model, images = config.model, config.train.batch_size
    tower = f"{model.vision.width} x {model.vision.depth}"
    if objective == "contrastive":
        return f"image tower {tower}, text tower {tower}, {images} pairs, {model.image_size} pixels"
    if objective == "reconstruction":
        return f"encoder {tower}, decoder {tower}, LPIPS on VGG, {images} images, {model.image_size} pixels"
    crops = config.data.augment
    return (
        f"trunk {tower}, {images} images with {GLOBAL_CROPS} crops of {crops.global_size} pixels and "
        f"{crops.local_crops} of {crops.local_size}, {model.dino_head.prototypes:,} prototypes"
    )


def dino_head(config: ResolvedConfig) -> nn.Module:
    from vtp.models.heads import DINOHead

    head = config.model.dino_head
    return DINOHead(
        config.model.vision.width, head.prototypes, nlayers=head.layers, hidden_dim=head.hidden,
        bottleneck_dim=head.bottleneck,
    )


def contrastive_loss(model: nn.Module, batch: Batch, setting: Setting) -> Loss:
    """CLIP's loss (arXiv 2103.00020)."""
    pixels = pinned(normalise(batch.images), setting)

    def loss() -> Tensor:
        images, words = (x.to(setting.device, non_blocking=True) for x in (pixels, batch.tokens))
        with setting.autocast():
            out = model(images, words, forward_type="clip")
            logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
            pairs = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    return loss


def reconstruction_loss(model: nn.Module, perceptual: nn.Module, batch: Batch, setting: Setting) -> Loss:
    """L1 and LPIPS."""
    pixels = pinned(normalise(batch.images[batch.rec_rows]), setting)

    def loss() -> Tensor:
        images = pixels.to(setting.device, non_blocking=True)
        with setting.autocast():
            shown = model(images, forward_type="rec")["reconstructed_image"].float()
            distances = perceptual(*(denormalise(x) * 2 - 1 for x in (shown, images)))
        return (shown - images).abs().mean() + distances.float().mean()

    return loss


def self_distillation(
    trunk: nn.Module, head: nn.Module, teacher_head: nn.Module, batch: Batch, setting: Setting, follow: float
) -> tuple[Loss, Callable[[], None]]:
    """The losses of DINO and iBOT as DINOv2 has them (arXiv 2304.07193), and the teacher's average."""
    teacher_trunk = deepcopy(trunk)
    crops = [pinned(normalise(x.flatten(0, 1)), setting) for x in (batch.global_crops, batch.local_crops)]
    rows, weights = (pinned(x, setting) for x in masked_rows(batch.masks))
    masks = pinned(batch.masks.flatten(0, 1), setting)

    def loss() -> Tensor:
        large, small, at, by_patch, mask = (
            x.to(setting.device, non_blocking=True) for x in (*crops, rows, weights, masks)
        )
        with setting.autocast():
            with torch.no_grad():
                seen = teacher_trunk(large, is_training=True, use_bottleneck=False)
                patches = seen["x_norm_patchtokens"].flatten(0, 1)[at]
                wanted = teacher_head(torch.cat([seen["x_norm_clstoken"], patches])).float()
            wanted = wanted.split([len(large), len(at)])
            whole, part = trunk([large, small], masks=[mask, None], is_training=True, use_bottleneck=False)
            patches = whole["x_norm_patchtokens"].flatten(0, 1)[at]
            logits = [head(x).float() for x in (whole["x_norm_clstoken"], part["x_norm_clstoken"], patches)]
        return plain_loss(logits, wanted, by_patch)

    def average() -> None:
        with torch.no_grad():
            for averaged, trained in ((teacher_trunk, trunk), (teacher_head, head)):
                for slow, fast in zip(averaged.parameters(), trained.parameters(), strict=True):
                    slow.lerp_(fast, follow)

    return loss, average


def pinned(x: Tensor, setting: Setting) -> Tensor:
    return x.pin_memory() if setting.device.type == "cuda" else x
