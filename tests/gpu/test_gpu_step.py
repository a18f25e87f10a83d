"""What only a GPU can show: no hidden wait for the device in a step, and the same numbers as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_run import FakeData, FakeTokenizer, build_model, tiny_config
from torch import Tensor

from megavtp.config.schema import Config
from megavtp.config.share import share
from megavtp.data.batch import Batch, StepDataset
from megavtp.objectives.prototypes import matmul_wide
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import Pass, execute
from megavtp.pretraining.passes import build_passes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


class Runner:
    def __init__(self, model):
        self.model, self.mesh = model, SINGLE

    def __call__(self, mode: str, **inputs):
        return self.model(mode, **inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def set_up(config: Config, device: torch.device) -> tuple[Runner, list[Pass], Batch]:
    batch = StepDataset(FakeData(), FakeTokenizer(), config)[0]
    return (
        Runner(build_model(config, SINGLE).to(device)), build_passes(config, share(config, 1), SINGLE, device, None),
        batch.pin_memory() if device.type == "cuda" else batch,
    )


def run_step(runner: Runner, passes: list[Pass], batch: Batch) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    for objective in passes:
        terms |= execute(objective, runner, batch)
    return terms


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


MICRO = {name: {"micro_batch": size} for name, size in
         {"contrastive": 4, "self_distillation": 2, "reconstruction": 2}.items()}


SIGLIP = {"objectives": {"contrastive": {"loss": "siglip"}}, "model": {"init_logit_bias": -10.0}}


@pytest.mark.parametrize("settings", [{}, {"objectives": MICRO}, SIGLIP,
                                      {"objectives": {"self_distillation": {"centering": "softmax"}}}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_pass_waits_for_the_device(settings, precision):
    prepared = set_up(tiny_config({**settings, "parallel": {"precision": precision}}), CUDA)
    run_step(*prepared)  # kernels are loaded, tables are made
    torch.cuda.synchronize()
    with waiting_is_an_error():
        terms = run_step(*prepared)
    assert all(value.isfinite() for value in terms.values())


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 5e-2)])
def test_terms_are_those_of_the_cpu(precision, tolerance):
    expected = run_step(*set_up(tiny_config({"parallel": {"precision": "fp32"}}), torch.device("cpu")))
    got = run_step(*set_up(tiny_config({"parallel": {"precision": precision}}), CUDA))
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(float(value), rel=tolerance), name


def test_wide_products_of_16_bit_tensors_keep_the_accumulator():
    a, b = (torch.randn(64, 256, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    got = matmul_wide(a, b.T)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-3)


def test_head_features_have_the_dtype_of_the_compute():
    runner, passes, batch = set_up(tiny_config({"parallel": {"precision": "bf16"}}), CUDA)
    distillation = next(p for p in passes if p.name == "self_distillation")
    distillation.prepare(runner, batch)
    *features, prototypes, backbone = runner(distillation.mode, **distillation.inputs(0))
    assert {x.dtype for x in features} == {torch.bfloat16}
    assert prototypes.dtype == backbone.dtype == torch.float32
