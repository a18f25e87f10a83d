import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest  # noqa: E402

# `from distributed import run_ranks`, `from tiny_run import tiny_config`
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parallel")]

LONG = (
    "test_layouts.py", "test_planned_memory.py", "test_planned_traffic.py", "test_rehearsal.py", "test_search.py",
    "test_gpu_report.py", "test_readme_runs.py",
)


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        # The launchers that tests start would take the GPUs, and want more of them than a machine has. Said before
        # torch is there, and to all processes.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
    config.pluginmanager.import_plugin("run_fixtures")


def pytest_collection_modifyitems(items):
    # The files that take minutes go first, so that none of them is left to one process at the end.
    items.sort(key=lambda item: item.path.name not in LONG)
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, which this machine has not, or `pytest -m gpu` to see it")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords would hold the folder's name too
            item.add_marker(skip)
