"""MegaVTP beside other libraries: the page, the measuring, and tiny forms of the comparisons whose rival is there."""

from __future__ import annotations

import math
import platform
import resource
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed import run_ranks

from benchmarks import rivals
from benchmarks.comparisons.comparison import Comparison, Pair, Setting
from benchmarks.comparisons.torchvision_kernels import define_missing
from benchmarks.side_by_side import alternate, difference, keep_freed_memory, peak_bytes, ratios

CPU = torch.device("cpu")
TINY = Setting(CPU, tiny=True)
# How much the results may differ. Steps are two, the first of which updates; crops are of other decoders and kernels.
AGREES = {"open_clip": 1e-5, "timm": 1e-5, "lightly": 1e-5, "lpips": 1e-3, "torchvision_v1": 0.01,
          "torchvision_v2": 0.01, "torch_fidelity": 1e-5, "pytorch_fid": 1e-5,
          "zero_0": 1e-5, "zero_3": 1e-5, "lightningdit": 1e-5, "vtp_contrastive": 1e-5,
          "vtp_self_distillation": 1e-5, "vtp_reconstruction": 1e-4}
WITH_ENGINE = (
    "open_clip", "diffusers", "zero_0", "zero_3", "lightningdit", "vtp_contrastive", "vtp_self_distillation",
    "vtp_reconstruction",
)  # DeepSpeed's, which wants a process group


def test_ways_take_turns():
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "AB"}
    ticks = iter(range(100))
    assert alternate(ways, 2, CPU, lambda: float(next(ticks))) == {"A": [1.0, 1.0], "B": [1.0, 1.0]}
    assert "".join(calls) == "ABABAB"  # the first two are not timed


def test_ratios_are_of_rounds():
    assert ratios([2, 8, 30, 80, 50], [2, 4, 10, 20, 10]) == (2.0, 3.0, 4.0)
    assert ratios([3], [2]) == (1.5, 1.5, 1.5)


def test_peak_counts_what_lives_at_one_time():
    def way() -> None:
        first = torch.zeros(1000, 250)
        second = first + 1
        del first
        torch.zeros(2000, 250).sum()
        del second

    assert peak_bytes(way, CPU) == pytest.approx(3 * 10**6, rel=0.01)


def page_faults_of_large_buffers(rank: int) -> list[int]:
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(b"x") * 80_000_000
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        keep_freed_memory()
    return faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_kept():
    ((given_back, first, again),) = run_ranks(1, page_faults_of_large_buffers)
    assert min(given_back, first) > 19_000 > 100 > again  # there are 19,500 pages of 4 KiB


def test_differences_are_relative_and_see_nan():
    assert difference([torch.tensor([1.0, 2.2])], [torch.tensor([1.0, 2.0])]) == pytest.approx(0.1)
    assert math.isnan(difference([torch.ones(2), torch.tensor([torch.nan])], [torch.ones(2), torch.ones(1)]))


def stand_in(rival: str, opened: Pair | Exception) -> Comparison:
    @contextmanager
    def opening(setting: Setting) -> Iterator[Pair]:
        if isinstance(opened, Exception):
            raise opened
        yield opened

    return Comparison("a sum", rival, opening)


def test_the_page_has_a_row_for_each_rival_and_says_what_is_missing():
    ones = torch.ones(1000)
    equal = Pair("1,000 numbers", lambda: ones + 1, lambda: (ones + 1, ones + 2), 1e-6)
    unlike = Pair("1,000 numbers", ones.sum, ones.sum, None, counts_memory=False)
    comparisons = {
        "equal": stand_in("torch", equal), "unlike": stand_in("numpy", unlike),
        "absent": stand_in("absent-package", ModuleNotFoundError("No module named 'absent'", name="absent")),
    }
    page, failed = rivals.compare(comparisons, TINY, 3)
    assert not failed
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    rows = {row[0]: row for row in cells}
    assert {len(row) for row in cells} == {8}
    assert rows["equal"][2] == f"torch {torch.__version__}" and rows["equal"][5:] == ["0.50", "1e-06", "1,000 numbers"]
    assert rows["unlike"][5:] == ["-", "other weights", "1,000 numbers"]
    low, high = map(float, rows["equal"][4].split(" to "))
    assert low <= float(rows["equal"][3]) <= high
    assert page.endswith(
        "Not compared:\n\n- absent: not installed (no module absent); "
        "pip install -c constraints.txt absent-package\n"
    )


def test_a_comparison_that_fails_leaves_the_others(capsys):
    sums = Pair("", torch.ones(2).sum, torch.ones(2).sum, 0.0)
    broken = stand_in("torch", TypeError("an unknown argument"))
    page, failed = rivals.compare({"broken": broken, "good": stand_in("torch", sums)}, TINY, 1)
    assert failed and "- broken: TypeError: an unknown argument\n" in page and "| good |" in page
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    ("--only timn", "argument --only: invalid choice: 'timn' (choose from"),
    ("--repeats 0", "argument --repeats: must be a whole number from 1 to 1,000, got '0'"),
    ("--out page.txt", "argument --out: page.txt must end in .md"),
])
def test_bad_options_are_one_line(words, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rivals.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        rivals.parse()
    error = capsys.readouterr().err
    assert end.value.code == 2 and told in error and error.count("\n") == 1


def test_the_extra_has_every_rival():
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))
    extra = {requirement.partition("==")[0] for requirement in setup.call_args.kwargs["extras_require"]["rivals"]}
    assert extra | {"torch"} >= {comparison.rival for comparison in rivals.COMPARISONS.values() if comparison.packaged}


def test_the_page_says_how_to_get_a_repository():
    opened = ModuleNotFoundError("No module named 'models'", name="models")
    page, failed = rivals.compare({"absent": stand_in("owner/name", opened)}, TINY, 1)
    assert not failed and page.endswith(
        "- absent: not installed (no module models); git clone https://github.com/owner/name, install what it needs, "
        "and name it in PYTHONPATH\n"
    )


def tiny_difference(name: str) -> tuple[float | None, str]:
    """Do the tiny work once more on both sides; return by how much the results differ, or why there are none."""
    define_missing()
    try:
        with rivals.COMPARISONS[name].start(TINY) as pair:
            pair.ours()
            pair.theirs()
            return pair.difference, ""
    except ImportError as error:
        return None, str(error)


def on_a_rank(rank: int, name: str) -> tuple[float | None, str]:
    return tiny_difference(name)


@pytest.mark.parametrize("name", [*AGREES, "diffusers"])
def test_both_compute_the_same(name):
    found, missing = run_ranks(1, on_a_rank, name, timeout=180)[0] if name in WITH_ENGINE else tiny_difference(name)
    if missing:
        pytest.skip(missing)
    assert found is None if name == "diffusers" else found < AGREES[name]
