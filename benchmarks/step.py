"""Compare training steps: ZeRO stages, recomputation, attention kernels, 16 bits, chunked prototypes.

    python benchmarks/step.py                                     # CPU: the tiny model; GPU: VTP-B
    python benchmarks/step.py --size l --batch 64 --steps 20 --out benchmarks/results

It compares the work of a step on one device in one process, always on the same batch. There is no data loading and no
communication, so the ZeRO stages show their overhead here and not their gain. Each case runs in a new process, which
has its own peak memory. Ratios are to the first case. It writes DEVICE.json and DEVICE.md. ``make test-gpu``
runs it on a GPU, after the tests.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without an install

CASES: dict[str, dict] = {
    "ZeRO 0": {},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "recompute": {"recompute": "full"},
    "two micro-batches": {"micro_batches": 2},
    "other precision": {"precision": "other"},
    "attention by crop size": {"attention": "sdpa"},
    "prototypes in one chunk": {"chunk": 10**9},
}


def main() -> None:
    options = parse()
    if options.case is not None:
        print("RESULT " + json.dumps(measure(options, CASES[options.case])))
        return
    if options.gpu and not has_gpu():
        print("skipped: the benchmark needs a CUDA device, and this machine has none")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    results, failed = {}, []
    for name in CASES:
        if (found := run_case(name)) is None:
            failed.append(name)
            continue
        results[name] = found
        stem = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
        report = table(results, options)  # all that there is, as the next case may be the last one that is waited for
        content = {"options": vars(options), "cases": results}
        (options.out / f"{stem}.json").write_text(json.dumps(content, default=str, indent=1) + "\n")
        (options.out / f"{stem}.md").write_text(report)
    print(report if results else "no case could be measured")
    if failed:
        sys.exit(f"error: these cases failed: {', '.join(failed)}; run one alone with --case NAME")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "s", "b", "l", "g"], help="model (default: b on a GPU, else tiny)")
    parser.add_argument("--batch", type=int, help="pairs of a step (default: 64 on a GPU, else 8)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two that are not; the median counts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the two files")
    parser.add_argument("--gpu", action="store_true", help="do nothing on a machine without a GPU, and say so")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_case(name: str) -> dict | None:
    print(f"{name} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *sys.argv, "--case", name], stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return None
    return json.loads(lines[0].removeprefix("RESULT "))


def measure(options: argparse.Namespace, case: dict) -> dict:
    from megavtp.launch import ranks

    device = ranks.start()
    config = make_config(options, case, device.type == "cuda")
    result = measure_config(config, device, make_batch(config, device.type == "cuda"), options.steps)
    ranks.stop()
    return result


def measure_config(config, device, batch, steps: int) -> dict:
    """Measure the steps of a VTP; LPIPS, where it is on, has random weights, which take the same time."""
    import torch

    from megavtp.config.share import share
    from megavtp.models.lpips import PERCEPTUAL_NETS, weight_shapes
    from megavtp.nn.compiling import compile_networks
    from megavtp.parallel.mesh import build_mesh
    from megavtp.planning.flops import flops_per_step
    from megavtp.pretraining.passes import build_passes
    from megavtp.pretraining.recipe import build_engine, build_model, build_perceptual

    mesh, shares = build_mesh(1, 1), share(config, 1)
    net = PERCEPTUAL_NETS.get(config.objectives.reconstruction.perceptual)
    # Small enough that no feature overflows.
    weights = {name: 0.02 * torch.randn(shape) for name, shape in weight_shapes(net).items()} if net else None
    perceptual = build_perceptual(config, device, weights)
    with drawn_on(device):
        model = build_model(config, shares, mesh, device)
    compile_networks(config.parallel.compile, device, model, perceptual)
    engine = build_engine(model, config, mesh)
    passes = build_passes(config, shares, mesh, device, perceptual)
    result = measure_steps(
        engine, passes, model.averaged(), batch, steps, flops_per_step(config)["total"], config.parallel.precision
    )
    return {
        "size": config.model.size, "batch": config.train.batch_size, "subset": config.objectives.reconstruction.batch,
        "pairs_per_second": config.train.batch_size / result["seconds"], **result,
    }


def measure_steps(engine, passes, averaged, batch, steps: int, flops: float, precision: str) -> dict:
    """Measure ``steps`` steps of ``flops`` operations each and close the engine. ValueError if one is skipped."""
    import torch

    from megavtp.planning.devices import device_peak_tflops
    from megavtp.training.progress import peak_memory_gib
    from megavtp.training.step import train_step

    device = engine.device

    def step() -> None:
        _, result = train_step(engine, passes, batch, lr_of=lambda group: 1e-4, averaged=averaged, follow=0.01)
        if not result.applied:
            raise ValueError("a step was skipped, as its loss or gradient is not finite")

    try:
        pace = timed(step, device, steps)
    finally:
        engine.close()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    peak = device_peak_tflops(name, precision)
    return {
        "device": name, "seconds": pace, "memory_gib": peak_memory_gib(device), "flops": flops,
        "mfu": flops / pace / (peak * 1e12) if peak else None,
    }


@contextmanager
def drawn_on(device) -> Iterator[None]:
    """Draw the initial values of a model on ``device``: on a CPU those of VTP-L take ten seconds."""
    import torch

    from megavtp.models import init

    def generator(name: str) -> torch.Generator:
        return torch.Generator(device).manual_seed(named(name).initial_seed())

    named = init.named_generator
    with patch.object(init, "named_generator", generator), device:
        yield


def timed(call: Callable[[], object], device, count: int, untimed: int = 2) -> float:
    """Return the median seconds of ``count`` calls, until the device has done them, after some that are not timed."""
    import torch

    seconds = []
    for _ in range(untimed + count):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[untimed:])[count // 2]


def make_config(options: argparse.Namespace, case: dict, gpu: bool):
    from megavtp.config.load import from_dict
    from megavtp.config.schema import Config
    from megavtp.config.validate import validate

    batch = options.batch or (64 if gpu else 8)
    own, other = ("bf16", "fp32") if gpu else ("fp32", "bf16")
    pieces = case.get("micro_batches", 1)
    part = {"batch": max(2, batch // 4), "micro_batch": max(2, batch // 4) // pieces}
    image = {} if gpu else {"image_size": 128, "text": {"context_length": 16, "vocab_size": 2048}}
    crops = {} if gpu else {"augment": {"global_size": 96, "local_size": 48, "local_crops": 4}}
    return validate(from_dict({
        "model": {"size": options.size or ("b" if gpu else "tiny"), **image},
        "objectives": {
            "contrastive": {"micro_batch": batch // pieces},
            "self_distillation": {**part, "chunk": case.get("chunk", 1024)},
            "reconstruction": {**part, "perceptual": "none"},
        },
        "data": {"streams": 1, **crops}, "train": {"batch_size": batch},
        "parallel": {
            "zero_stage": case.get("zero_stage", 0), "recompute": case.get("recompute", "none"),
            "precision": other if case.get("precision") else own, "attention": case.get("attention", "auto"),
        },
    }, Config), 1)


def make_batch(config, pin: bool):
    """Make a batch of noise in the shapes and with the masks of a real one."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from megavtp.data.batch import StepDataset
    from megavtp.data.shards import RawSample

    class Noise:
        shard_counts = (config.train.batch_size,)

        def read(self, shard: int, row: int) -> RawSample:
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(row).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            return RawSample(str(row), file.getvalue(), "noise", {}, str(row))

    class Tokens:
        def encode(self, captions: list[str]) -> torch.Tensor:
            draw = torch.Generator().manual_seed(0)
            text = config.model.text
            return torch.randint(text.vocab_size, (len(captions), text.context_length), generator=draw)

    batch = StepDataset(Noise(), Tokens(), config)[0]
    return batch.pin_memory() if pin else batch


def table(results: dict[str, dict], options: argparse.Namespace) -> str:
    base = next(iter(results.values()))
    lines = [
        f"{base['device']}: VTP-{base['size']}, {base['batch']} pairs a step, {base['subset']} of them for "
        f"self-distillation and as many for reconstruction; median of {options.steps} steps of one process, without "
        "data loading.",
        "",
        "| case | pairs/s | to the first | peak memory, GiB | to the first | MFU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, got in results.items():
        speed, memory = base["seconds"] / got["seconds"], got["memory_gib"] / base["memory_gib"]
        mfu = "" if got["mfu"] is None else f"{got['mfu']:.1%}"
        lines.append(
            f"| {name} | {got['pairs_per_second']:.4g} | {speed:.2f} | {got['memory_gib']:.2f} | {memory:.2f} | {mfu} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
