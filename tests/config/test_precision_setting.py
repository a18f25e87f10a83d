"""``parallel.precision=auto``: what the machine multiplies natively."""

from __future__ import annotations

import pytest
import torch

from megavtp.config import precision
from megavtp.config.load import load_config
from megavtp.config.run import ParallelConfig
from megavtp.config.schema import DEMO_CONFIG, Config
from megavtp.config.validate import validate


@pytest.fixture
def resolve(monkeypatch):
    def ask(*, gpu: bool = False, native: bool = False, features: dict[str, bool] | None = None) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
        if features is None:
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        else:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
        return precision.with_precision(ParallelConfig(precision="auto")).precision

    return ask


def test_auto_is_what_the_machine_multiplies_natively(resolve):
    assert resolve(gpu=True, native=True) == "bf16"
    assert resolve(gpu=True, native=False, features={"avx512_bf16": True}) == "fp32"  # the GPU counts, not its host
    assert resolve(features={"avx512_bf16": True}) == "bf16"
    assert resolve(features={"amx_bf16": True, "avx512_bf16": False}) == "bf16"
    assert resolve(features={"avx2": True, "avx512_bf16": False}) == "fp32"
    assert resolve(features=None) == "fp32"  # a torch that cannot tell


def test_a_given_precision_stays(monkeypatch):
    monkeypatch.setattr(precision, "_has_native_bfloat16", lambda: pytest.fail("asked the machine"))
    for given in ("fp32", "bf16"):
        assert precision.with_precision(ParallelConfig(precision=given)).precision == given


@pytest.mark.parametrize("native", [True, False])
def test_a_checked_config_knows_its_precision(monkeypatch, native):
    monkeypatch.setattr(precision, "_has_native_bfloat16", lambda: native)
    config = validate(load_config(DEMO_CONFIG, Config, ["parallel.precision=auto"]), 2)
    assert config.parallel.precision == ("bf16" if native else "fp32")
    assert precision.compute_dtype("auto") is (torch.bfloat16 if native else torch.float32)  # of what samples
