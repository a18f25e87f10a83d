"""The report about a GPU: its flow with parts that end badly, and a rehearsal of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu import kernels
from benchmarks.gpu.measure import reason
from benchmarks.gpu.parts import BUDGET, Column, Part, all_parts
from benchmarks.gpu.supervise import supervise
from benchmarks.step import measure_steps
from megavtp.config.load import load_config
from megavtp.config.schema import Config
from megavtp.errors import UserError
from megavtp.nn.attention_kernels import attend
from megavtp.pretraining.validate import validate_pretraining

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_report.py"
MACHINE = {
    "device": "NVIDIA H200", "cores": 16, "memory_gib": 128.0, "device_memory_gib": 139.8, "date": "2026-01-02",
    "rehearsal": False, "command": "gpu_report.py", "versions": {"torch": "2.11.0"},
}
TELLS = "import os, sys, time\ntell = lambda text: print('RESULT ' + text, flush=True)\n"
COLUMNS = (
    Column("ms", lambda row, rates: f"{row['seconds'] * 1e3:.1f}"),
    Column("planned, GiB", lambda row, rates: f"{row['planned_gib']}"),
)


def part(name: str, program: str, limit: float = 60, cases: tuple[str, ...] = ("one", "two")) -> Part:
    return Part(name, [sys.executable, "-c", TELLS + program], limit, cases, COLUMNS, "A note.")


ONE = """tell('{"case": "one", "seconds": 0.25}')\n"""


def filled(folder: Path, *parts: Part, budget: float = 300) -> tuple[gpu_report.Report, list[str], str]:
    report = gpu_report.Report(folder, parts, MACHINE)
    failed = report.fill(budget)
    return report, failed, report.page_file.read_text()


def test_a_part_that_finishes(tmp_path):
    other = """tell('{"case": "two", "missing": "out of memory"}')\ntell('{"case": "two", "planned_gib": 200}')"""
    report, failed, page = filled(tmp_path, part("good", ONE + other))
    assert failed == [] and report.page_file.name == "nvidia-h200-2026-01-02.md"
    assert "| case | ms | planned, GiB |\n| --- | --- | --- |\n| one | 250.0 | - |\n| two | - | 200 |" in page
    assert "- two: missing, out of memory" in page and "- one: missing" not in page and "This part took" in page
    assert "NVIDIA H200 with 140 GiB, 16 CPU cores" in page and "torch 2.11.0" in page
    lines = [json.loads(line) for line in report.lines_file.read_text().splitlines()]
    assert lines[0] == MACHINE and lines[1] == {"part": "good", "case": "one", "seconds": 0.25}


def test_a_part_that_overruns_keeps_what_it_told(tmp_path):
    sleeper = part("slow", ONE + "time.sleep(600)", limit=1)
    start = time.monotonic()
    report, failed, page = filled(tmp_path, sleeper, part("next", ONE, limit=60), budget=65)
    assert time.monotonic() - start < 60 and failed == ["slow"]
    assert "| one | 250.0 |" in page and "- two: missing, time limit of" in page
    assert page.index("This part did not finish: time limit") < page.index("## next")
    assert page.count("| one | 250.0 |") == 2  # of the part after it as well


@pytest.mark.parametrize("program, why", [
    ("raise ValueError('a bad shape')", "ended with status 1: ValueError: a bad shape"),
    ("os.kill(os.getpid(), 9)", "ended by SIGKILL, as for lack of memory"),
])
def test_a_part_that_crashes_keeps_what_it_told(tmp_path, program, why):
    report, failed, page = filled(tmp_path, part("bad", ONE + program))
    assert failed == ["bad"]
    assert "| one | 250.0 |" in page and f"- two: missing, {why}" in page and "Traceback" not in page


def test_what_a_part_has_told_is_on_the_page_at_once(tmp_path):
    page = tmp_path / "nvidia-h200-2026-01-02.md"
    look = f"time.sleep(1)\nsys.exit('| one | 250.0 |' not in open({str(page)!r}).read())"
    assert filled(tmp_path, part("good", ONE + look))[1] == []


def test_nothing_that_a_part_started_is_left(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    end = supervise([sys.executable, "-c", program], 5, print)
    assert end.why == "time limit of 5 s"
    stat, deadline = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 10  # a killed one takes a moment to die

    def dead() -> bool:
        try:
            return stat.read_text().split()[2] in "ZX"  # nobody has waited for it yet
        except (FileNotFoundError, ProcessLookupError):
            return True

    while not dead():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_limits_fit_into_nine_minutes():
    assert sum(part.limit for part in all_parts(rehearse=False)) < BUDGET - 30 < 540 - 30


def test_the_last_parts_give_way_to_a_late_start():
    assert gpu_report.shortened([35, 90, 70], 200) == [35, 90, 70]
    assert gpu_report.shortened([35, 90, 70], 150) == [35, 90, 25]
    assert gpu_report.shortened([35, 90, 70], 100) == [35, 65, 0]


def test_every_column_shows_a_number():
    for part in all_parts(rehearse=False):
        for column in part.columns:
            assert column.show(defaultdict(lambda: 2), {"flops": 1.0, "bytes": 1.0})


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match="--parts VTP-X: there is no such part; choose from kernels, VTP-S"):
        gpu_report.chosen(all_parts(False), "VTP-L, VTP-X")
    assert [part.name for part in gpu_report.chosen(all_parts(False), "sampling,VTP-L")] == ["VTP-L", "sampling"]


def test_reasons_are_one_line():
    assert reason(MemoryError()) == "out of memory"
    assert reason(ModuleNotFoundError("No module", name="apex")) == "not installed (no module apex)"
    assert reason(ImportError("undefined symbol\nmore")) == "installed, but cannot be imported: undefined symbol"
    assert reason(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")) == "out of memory"
    assert reason(UserError("a remedy")) == "a remedy" and reason(ValueError("a\nb")) == "ValueError: a"


def test_a_skipped_step_is_not_measured(monkeypatch):
    from megavtp.training import step

    closed: list[bool] = []
    monkeypatch.setattr(step, "train_step", lambda *_, **__: ({}, SimpleNamespace(applied=False)))
    engine = SimpleNamespace(device=torch.device("cpu"), close=lambda: closed.append(True))
    with pytest.raises(ValueError, match="a step was skipped, as its loss or gradient is not finite"):
        measure_steps(engine, [], [], None, 1, 1.0, "fp32")
    assert closed


def test_a_kernel_agrees_if_its_result_and_gradients_do():
    def agrees(change) -> bool:
        def kernel(q, k, v, segments):
            return change(q, attend(q, k, v, segments, kernel="sdpa"))

        return kernels.compare_attention(kernel, ((2, 5), (3, 2)), torch.device("cpu"))["agrees"]

    assert agrees(lambda q, out: out) and not agrees(lambda q, out: 1.1 * out)
    assert not agrees(lambda q, out: out + 0 * (0 * q).sqrt())  # the gradient by q is NaN, nothing else


def test_every_case_is_a_run_of_today():
    from benchmarks.gpu.reading import run_of
    from benchmarks.gpu.steps import STEP_CASES, VTP_CASES, dit_config, vtp_config

    for case in VTP_CASES.values():
        assert vtp_config("l", case, False).parallel.precision == "bf16"
    for case in STEP_CASES.values():
        assert dit_config(case, False).train.batch_size == 128
    for rehearse in (False, True):
        recipe, settings = run_of(rehearse)
        assert validate_pretraining(load_config(recipe, Config, settings), 1).train.steps <= 64


def test_a_machine_without_a_gpu_says_so(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and done.stderr.startswith("error: no GPU: torch finds no CUDA device")
    assert "--rehearse" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_fills_the_page(tmp_path):
    command = [sys.executable, SCRIPT, "--rehearse", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = (file.read_text() for file in tmp_path.glob("*.md"))
    assert "| ZeRO 3 |" in page and "| guidance 3 |" in page and "needs a CUDA device" in page
    assert page.count("This part took") == len(all_parts(rehearse=True))
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert any("planned_gib" in line for line in lines) and any("data_wait" in line for line in lines)
