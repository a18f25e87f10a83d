"""The contrastive step beside OpenCLIP's: forward, loss, backward, clipping, and the update by fused AdamW."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import LR, Pair, Setting, step_of, steps_differ
from benchmarks.comparisons.trunk import PATCH, dinov3, model_like_dinov3
from benchmarks.step import make_batch
from megavtp.checkpoint.formats.initial import fill
from megavtp.checkpoint.formats.openclip import from_openclip
from megavtp.config.load import from_dict
from megavtp.config.schema import Config
from megavtp.config.share import share
from megavtp.config.sizes import ResolvedConfig, Shape
from megavtp.config.validate import validate
from megavtp.data.batch import Batch
from megavtp.nn.compiling import compile_networks
from megavtp.parallel.mesh import build_mesh
from megavtp.pixels import normalise
from megavtp.pretraining.passes import build_passes
from megavtp.pretraining.recipe import build_engine, build_model
from megavtp.training.step import train_step


@contextmanager
def contrastive(setting: Setting, own_tower: bool) -> Iterator[Pair]:
    """``own_tower``: OpenCLIP's own ViT instead of timm's; our trunk cannot compute its function."""
    import open_clip

    shape = setting.size((32, 2, 2), (384, 4, 6), (768, 12, 12))
    text = setting.size((32, 2, 2), (384, 4, 6), (512, 12, 8))
    image, batch = setting.size((32, 4), (224, 16), (224, 256))
    layer_scale = None if own_tower else 1.0
    config = contrastive_config(setting, model_like_dinov3(shape, image, layer_scale), text, batch)
    words = config.model.text
    theirs = open_clip.CLIP(
        embed_dim=words.width,
        vision_cfg={
            "image_size": image, "patch_size": PATCH, "width": shape[0], "layers": shape[1],
            "head_width": shape[0] // shape[2],
        },
        text_cfg={
            "context_length": words.context_length, "vocab_size": words.vocab_size, "width": words.width,
            "layers": words.depth, "heads": words.heads,
        },
    )
    if not own_tower:  # as open_clip.timm_model puts one in, for a size that timm has no name for
        head = nn.Sequential(OrderedDict(proj=nn.Linear(shape[0], words.width, bias=False)))
        theirs.visual = nn.Sequential(OrderedDict(trunk=dinov3(shape, image), head=head))
    theirs = theirs.to(setting.device)
    pairs, mesh = make_batch(config, setting.device.type == "cuda"), build_mesh(1, 1)
    model = build_model(config, share(config, 1), mesh, setting.device)
    compile_networks(config.parallel.compile, setting.device, model)
    found = from_openclip(theirs.state_dict(), config.model, {n: list(p.shape) for n, p in model.named_parameters()})
    if not own_tower:
        found.tensors["visual_proj.weight"] = theirs.visual.head.proj.weight
    fill(model, found.tensors)
    engine = build_engine(model, config, mesh)
    passes = build_passes(config, share(config, 1), mesh, setting.device, None)

    def our_step() -> Tensor:
        terms, _ = train_step(engine, passes, pairs, lr_of=lambda group: LR)
        return terms["contrastive/loss"]

    their_step = open_clip_step(theirs, open_clip.ClipLoss(), pairs, config, setting)
    differ = steps_differ(our_step, their_step)
    with closing(engine):
        yield Pair(
            f"image tower {shape[0]} x {shape[1]}, text tower {text[0]} x {text[1]}, {batch} pairs, {image} pixels",
            our_step, their_step, None if own_tower else differ,
        )


def contrastive_config(
    setting: Setting, vision: dict[str, Any], text: Shape, batch: int, zero_stage: int = 0
) -> ResolvedConfig:
    words = dict(zip(("width", "depth", "heads"), text), vocab_size=512 if setting.tiny else 49408)
    return validate(from_dict({
        "model": vision | {"text": words},
        "objectives": {"self_distillation": {"weight": 0.0}, "reconstruction": {"weight": 0.0}},
        "data": {"streams": 1}, "train": {"batch_size": batch},
        "parallel": {"precision": setting.precision, "zero_stage": zero_stage},
    }, Config), 1)


def open_clip_step(
    model: nn.Module, loss_of: nn.Module, pairs: Batch, config: ResolvedConfig, setting: Setting
) -> Callable[[], Tensor]:
    """Return the step of OpenCLIP's training loop, with the groups and clipping that we have, on normalised pixels."""
    pixels = normalise(pairs.images)
    if setting.device.type == "cuda":
        pixels = pixels.pin_memory()

    def loss() -> Tensor:
        images, words = (x.to(setting.device, non_blocking=True) for x in (pixels, pairs.tokens))
        with setting.autocast():
            return loss_of(*model(images, words))

    def clamp() -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step_of(model, loss, config.train.optimizer, clamp)
