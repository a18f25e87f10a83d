"""A step of MegaVTP's own model by its engine, beside the same passes with torch alone: what ZeRO costs one process."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from benchmarks.comparisons.comparison import LR, Pair, Setting, step_of, steps_differ
from benchmarks.comparisons.contrastive import contrastive_config
from benchmarks.step import make_batch
from megavtp.config.share import share
from megavtp.models.vtp import VTP
from megavtp.nn.compiling import compile_networks
from megavtp.parallel.mesh import SINGLE, build_mesh
from megavtp.pretraining.passes import build_passes
from megavtp.pretraining.recipe import build_engine, build_model
from megavtp.training.step import train_step


@contextmanager
def engine_step(setting: Setting, stage: int) -> Iterator[Pair]:
    width, depth, heads = setting.size((32, 2, 2), (384, 4, 6), (768, 12, 12))
    image, batch = setting.size((32, 4), (224, 16), (224, 256))
    vision = {"image_size": image, "vision": {"width": width, "depth": depth, "heads": heads}}
    config = contrastive_config(setting, vision, (width, depth, heads), batch, stage)
    pairs, mesh = make_batch(config, setting.device.type == "cuda"), build_mesh(1, 1)
    model = build_model(config, share(config, 1), mesh, setting.device)
    compile_networks(config.parallel.compile, setting.device, model)
    plain, torch_linear = Plain(deepcopy(model)), F.linear
    engine = build_engine(model, config, mesh)
    engine_linear = F.linear  # a ZeRO-3 engine puts its own there, for the whole process
    F.linear = torch_linear
    (objective,) = build_passes(config, share(config, 1), mesh, setting.device, None)
    def our_step() -> Tensor:
        with patch.object(F, "linear", engine_linear):
            terms, _ = train_step(engine, [objective], pairs, lr_of=lambda group: LR)
        return terms["contrastive/loss"]

    def their_loss() -> Tensor:
        objective.prepare(plain, pairs)
        outputs = plain(objective.mode, **objective.inputs(0))
        terms = objective.global_terms(*objective.global_inputs(outputs))
        return sum(objective.weighted(terms)) * objective.weight  # the weight is 1

    their_step = step_of(plain.module, their_loss, config.train.optimizer)
    with closing(engine):
        yield Pair(
            f"image and text tower {width} x {depth}, {batch} pairs, {image} pixels, and fused AdamW, clipped",
            our_step, their_step, steps_differ(our_step, their_step),
        )


class Plain:
    """Runs a model's forwards without an engine."""

    mesh = SINGLE

    def __init__(self, module: VTP):
        self.module = module

    def __call__(self, mode: str, **inputs: Any) -> Any:
        return self.module(mode, **inputs)
