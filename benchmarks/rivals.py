"""Compare MegaVTP with what pip installs for the same work: time, memory, and whether the results are equal.

    python benchmarks/rivals.py                                   # all comparisons, on a GPU if there is one
    python benchmarks/rivals.py --only timm lpips --repeats 15 --busy
    python benchmarks/rivals.py --out benchmarks/rivals.md        # make benchmark

Each comparison takes turns, A B A B, in one process: the same inputs, dtype, threads, and weights where one library's
fit into the other. A ratio is of the rival's time to MegaVTP's in a round, so above 1 MegaVTP is faster; the table has
the median of the rounds. A rival that is not installed is named, with the line that installs it.
"""

import argparse
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

from megavtp.cli import run  # noqa: E402
from megavtp.options import Options, new_file, whole  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # rivals have nothing to fetch
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, would tell of itself

import torch  # noqa: E402

from benchmarks.comparisons.comparison import Comparison, Pair, Setting  # noqa: E402
from benchmarks.comparisons.contrastive import contrastive  # noqa: E402
from benchmarks.comparisons.diffusion import diffusers_dit, lightningdit  # noqa: E402
from benchmarks.comparisons.distances import frechet, pytorch_fid, torch_fidelity  # noqa: E402
from benchmarks.comparisons.engine import engine_step  # noqa: E402
from benchmarks.comparisons.loading import loading  # noqa: E402
from benchmarks.comparisons.perceptual import perceptual  # noqa: E402
from benchmarks.comparisons.self_distillation import self_distillation  # noqa: E402
from benchmarks.comparisons.torchvision_kernels import define_missing  # noqa: E402
from benchmarks.comparisons.trunk import trunk  # noqa: E402
from benchmarks.comparisons.vtp import official  # noqa: E402
from benchmarks.gpu.measure import reason  # noqa: E402
from benchmarks.side_by_side import alternate, keep_freed_memory, peak_bytes, ratios  # noqa: E402
from megavtp.data.files import write_atomic  # noqa: E402
from megavtp.launch import ranks  # noqa: E402
from megavtp.parallel.mesh import SINGLE  # noqa: E402
from megavtp.training.start import start_record  # noqa: E402

VTP, LIGHTNINGDIT = "MiniMax-AI/VTP", "JingfengYao/LightningDiT"
COMPARISONS: Mapping[str, Comparison] = {
    "open_clip": Comparison("contrastive step", "open_clip_torch", partial(contrastive, own_tower=False)),
    "open_clip_vit": Comparison("the same, its own ViT", "open_clip_torch", partial(contrastive, own_tower=True)),
    "timm": Comparison("trunk", "timm", trunk),
    "lightly": Comparison("self-distillation's losses", "lightly", self_distillation),
    "lpips": Comparison("perceptual distance", "lpips", perceptual),
    "diffusers": Comparison("DiT's step", "diffusers", diffusers_dit),
    "lightningdit": Comparison("DiT's step", LIGHTNINGDIT, partial(lightningdit, compiled=False)),
    "lightningdit_compiled": Comparison("the same, both compiled", LIGHTNINGDIT, partial(lightningdit, compiled=True)),
    **{
        f"vtp_{objective}": Comparison(f"{what} step", VTP, partial(official, objective=objective))
        for objective, what in [
            ("contrastive", "contrastive"), ("self_distillation", "self-distillation"),
            ("reconstruction", "reconstruction"),
        ]
    },
    "torchvision_v1": Comparison("loader, transforms v1", "torchvision", partial(loading, version="v1")),
    "torchvision_v2": Comparison("loader, transforms v2", "torchvision", partial(loading, version="v2")),
    "torch_fidelity": Comparison("Frechet distance", "torch-fidelity", partial(frechet, distance_by=torch_fidelity)),
    "pytorch_fid": Comparison("Frechet distance", "pytorch-fid", partial(frechet, distance_by=pytorch_fid)),
    **{
        f"zero_{stage}": Comparison(f"step under ZeRO {stage}, alone", "torch", partial(engine_step, stage=stage))
        for stage in range(4)
    },
}
HEAD = [
    "| name | what | beside | ratio | quartiles | memory | results differ by | work |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]
OURS, THEIRS = "MegaVTP", "rival"


class Clock(NamedTuple):
    name: str
    now: Callable[[], float]


WALL = Clock("time", time.perf_counter)
PROCESSOR = Clock("processor time", lambda: sum(os.times()[:4]))  # of this process and of workers that have ended


def main() -> int:
    options = parse()
    define_missing()
    keep_freed_memory()
    setting = Setting(ranks.start(), options.tiny)
    chosen = {name: COMPARISONS[name] for name in options.only or COMPARISONS}
    text, failed = compare(chosen, setting, options.repeats, PROCESSOR if options.busy else WALL)
    ranks.stop()
    print(text, end="")
    if options.out is not None:
        write_atomic(options.out, text.encode())
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, metavar="NAME", help="of " + ", ".join(COMPARISONS))
    parser.add_argument("--repeats", type=whole(1, 1000), default=9, help="timed rounds of a comparison (default: 9)")
    parser.add_argument("--out", type=new_file(".md"), help="file that the page is also written to")
    parser.add_argument("--busy", action="store_true", help="count processor time: other work goes on on this machine")
    parser.add_argument("--tiny", action="store_true", help="sizes that take no time, to try it out")
    return parser.parse_args()


def compare(
    comparisons: Mapping[str, Comparison], setting: Setting, repeats: int, clock: Clock = WALL
) -> tuple[str, bool]:
    """Return the page about the comparisons, and whether one failed with its rival installed."""
    rows, missing, failed = [], [], False
    for name, comparison in comparisons.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            with comparison.start(setting) as pair:
                seconds = alternate({OURS: pair.ours, THEIRS: pair.theirs}, repeats, setting.device, clock.now)
                rows.append(row(name, comparison, pair, seconds, setting.device))
        except ImportError as error:
            missing.append(f"{name}: {reason(error)}; {comparison.remedy}")
        except Exception as error:
            traceback.print_exc()
            missing.append(f"{name}: {reason(error)}")
            failed = True
    return page(setting, repeats, clock, rows, missing), failed


def row(
    name: str, comparison: Comparison, pair: Pair, seconds: Mapping[str, Sequence[float]], device: torch.device
) -> str:
    low, ratio, high = ratios(seconds[THEIRS], seconds[OURS])
    memory = "-"
    if pair.counts_memory:
        ours, theirs = (peak_bytes(way, device) for way in (pair.ours, pair.theirs))
        memory = f"{ours / theirs:.2f}"
    differ = "other weights" if pair.difference is None else f"{pair.difference:.0e}" if pair.difference else "0"
    return (
        f"| {name} | {comparison.what} | {comparison.source} | {ratio:.2f} | "
        f"{low:.2f} to {high:.2f} | {memory} | {differ} | {pair.work} |"
    )


def page(setting: Setting, repeats: int, clock: Clock, rows: list[str], missing: list[str]) -> str:
    record = start_record(SINGLE)
    device = record["machine"]["device"]
    lines = [
        "# MegaVTP beside other libraries", "",
        f"`{shlex.join(['python', *sys.argv])}`, {time.strftime('%Y-%m-%d')}, on "
        + (processor() if setting.device.type == "cpu" else device)
        + f", torch {record['versions']['torch']}, {torch.get_num_threads()} threads, {setting.precision}.",
        "",
        f"Ratio: the rival's {clock.name} to MegaVTP's, the median of {repeats} rounds, in each of which both take "
        "their turn; above 1 MegaVTP is faster. Memory: the most that torch has allocated at one time, MegaVTP's to "
        "the rival's; below 1 MegaVTP takes less. Results differ by: the largest difference as a part of the largest "
        "number; for pictures the mean difference as a part of white. With glibc, the process keeps the memory that it "
        "frees, as torch does on a GPU.",
        "",
        *HEAD, *rows,
    ]
    if missing:
        lines += ["", "Not compared:", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Name the CPU as Linux does."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()


if __name__ == "__main__":
    run(main)
