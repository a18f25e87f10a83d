import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# `from distributed import run_ranks`, `from tiny_run import tiny_config`
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parallel")]

pytest_plugins = ["run_fixtures"]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords would hold the folder's name too
            item.add_marker(skip)
