"""Training steps of whole models on one device, and the memory that the planner gives them."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import attempt, tell
from benchmarks.gpu.parts import DIT_BATCH, MEASURE, STEP_CASES, VTP_BATCH, VTP_CASES
from benchmarks.step import drawn_on, make_batch, measure_config, measure_steps
from megavtp.config.load import load_config
from megavtp.config.schema import Config
from megavtp.config.sizes import ResolvedConfig, known
from megavtp.config.validate import validate
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.plan import planned
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.validate import validate_dit
from megavtp.errors import UserError
from megavtp.launch import ranks
from megavtp.nn import compiling
from megavtp.parallel.mesh import SINGLE
from megavtp.planning.devices import find_device
from megavtp.planning.plan import GIB, Planner, RankPlan
from megavtp.training.optimizer import parameter_groups

CONFIGS = Path(__file__).parents[2] / "configs"
_ANY = find_device("h200")  # bytes do not depend on the device, so any will do for counting them


def vtp_config(size: str, case: list[str], rehearse: bool) -> ResolvedConfig:
    batch = 8 if rehearse else VTP_BATCH[size]
    # One micro-batch, and the parts of the batch that the paper's recipes have.
    settings = [
        f"train.batch_size={batch}", "data.streams=1", "objectives.contrastive.micro_batch=null",
        *(f"objectives.{name}.{key}={value}" for name, part in (("self_distillation", 4), ("reconstruction", 8))
          for key, value in (("batch", max(2, batch // part)), ("micro_batch", "null"))),
        "model.text.vocab_size=" + ("512" if rehearse else "49408"), *case,
    ]
    settings = [*(["parallel.compile=blocks"] if rehearse else []), *settings]  # as on a GPU
    recipe = "demo/vtp_emoji.yaml" if rehearse else f"pretrain/vtp_{size}.yaml"
    return validate(load_config(CONFIGS / recipe, Config, settings), 1)


def dit_config(case: list[str], rehearse: bool) -> CompleteDiTConfig:
    batch = 8 if rehearse else DIT_BATCH
    settings = [f"train.batch_size={batch}", "data.streams=1", "flow_matching.micro_batch=null", *case]
    if rehearse:
        settings = ["parallel.compile=blocks", *settings]
        settings += ["model.latent_size=4", "model.latent_channels=8", "model.num_classes=10"]
    recipe = "demo/dit_emoji.yaml" if rehearse else "dit/dit_xl.yaml"
    return complete_config(validate_dit(load_config(CONFIGS / recipe, DiTConfig, settings), 1))


def start(rehearse: bool) -> torch.device:
    if rehearse:
        compiling.BACKEND = "aot_eager"  # a C++ compiler takes minutes for what is run twice
    return ranks.start()


@contextmanager
def plans_beside(part: str, rehearse: bool) -> Iterator[None]:
    """Let a process of its own tell what is planned of a part, as soon as it is known. UserError if it fails."""
    extra = ["--rehearse"] if rehearse else []
    plans = subprocess.Popen(
        [sys.executable, str(MEASURE), part, *extra], stdin=subprocess.DEVNULL,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},  # rehearsals are on the CPU
    )
    yield
    if plans.wait():
        raise UserError("the steps could not be planned")


def tell_plan(name: str, plan: RankPlan) -> None:
    tell(case=name, planned_gib=plan.memory / GIB, moved_bytes=plan.moved_bytes)


def measure_vtp(size: str, rehearse: bool) -> None:
    device, steps = start(rehearse), 1 if rehearse else 5
    configs = {name: vtp_config(size, case, rehearse) for name, case in VTP_CASES.items()}
    with plans_beside(f"plan-{size}", rehearse):
        batch = make_batch(next(iter(configs.values())), device.type == "cuda")
        for name, config in configs.items():
            forget(device)
            attempt(name, partial(measure_config, config, device, batch, steps))
        ranks.stop()


def plan_vtp(size: str, rehearse: bool) -> None:
    planners: dict[Any, Planner] = {}
    for name, case in VTP_CASES.items():
        config = vtp_config(size, case, rehearse)
        alike = config.objectives, config.parallel.compile
        if alike not in planners:
            groups = partial(parameter_groups, config=config.train.optimizer)
            planners[alike] = Planner(config, groups, _ANY, cuda=torch.cuda.is_available())
        tell_plan(name, planners[alike].plan(config, 1).fullest)


def measure_dit(_: str, rehearse: bool) -> None:
    device = start(rehearse)

    def measure(config: CompleteDiTConfig) -> dict[str, Any]:
        recipe = DiTTraining(config, device)
        with drawn_on(device):
            recipe.build()
        result = measure_steps(
            recipe.engine, recipe.passes(), recipe.averaged(), noise_batch(config, device.type == "cuda"),
            1 if rehearse else 5, recipe.flops_per_step(), config.parallel.precision,
        )
        return {"latents_per_second": config.train.batch_size / result["seconds"], **result}

    with plans_beside("plan-dit-xl", rehearse):
        for name, case in STEP_CASES.items():
            forget(device)
            attempt(name, lambda case=case: measure(dit_config(case, rehearse)))
        ranks.stop()


def plan_dit(_: str, rehearse: bool) -> None:
    for name, case in STEP_CASES.items():
        tell_plan(name, planned(dit_config(case, rehearse), SINGLE, cuda=torch.cuda.is_available()))


def noise_batch(config: CompleteDiTConfig, pin: bool) -> LatentBatch:
    model, size = config.model, config.train.batch_size
    shape = (size, model.latent_channels, model.latent_size, model.latent_size)
    batch = LatentBatch(
        step=0, ids=[str(i) for i in range(size)], positions=torch.arange(size), latents=torch.randn(shape),
        noise=torch.randn(shape), times=torch.rand(size),
        conditions=torch.randint(known(model.num_classes, "model.num_classes"), (size,)),
    )
    return batch.pin_memory() if pin else batch


def forget(device: torch.device) -> None:
    """Let the next case begin with an empty device and a peak of its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
