"""Which tests see a GPU, and the benchmark that starts with those of a GPU."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("selected, seen", [("", ""), ("not gpu", ""), ("gpu", "0,1")])
def test_only_gpu_tests_see_a_gpu(selected, seen, monkeypatch, request):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # of this run
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=selected), pluginmanager=mock.Mock()))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_make_starts_the_benchmark_with_the_gpu_tests():
    make = ["make", "-n", "-C", str(ROOT), "test-gpu"]
    commands = subprocess.run(make, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "-m pytest -m gpu" in commands and "benchmarks/step.py --gpu" in commands


def test_a_benchmark_for_gpus_says_why_it_does_not_run():
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "--gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "skipped: the benchmark needs a CUDA device, and this machine has none\n"


@pytest.mark.parametrize("gpu", [False, True])
def test_every_case_of_the_benchmark_is_a_run_of_today(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py"])
    step = runpy.run_path(str(ROOT / "benchmarks" / "step.py"))
    for case in step["CASES"].values():
        config = step["make_config"](step["parse"](), case, gpu)
        assert (config.parallel.precision == "bf16") == (gpu != ("precision" in case))
