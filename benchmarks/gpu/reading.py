"""A run of the launcher on files, whose telemetry says how long it waits for its loader."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.measure import attempt
from benchmarks.gpu.parts import VTP_BATCH
from megavtp.data.sources.images import prepare_images
from megavtp.errors import UserError

ROOT = Path(__file__).parents[2]


def measure_loader(_: str, rehearse: bool) -> None:
    attempt("VTP-S", lambda: measure(rehearse))


def measure(rehearse: bool) -> dict[str, Any]:
    workers = 1 if rehearse else min(16, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        pictures, root, output = Path(folder, "pictures"), Path(folder, "pairs"), Path(folder, "run")
        write_pairs(pictures, 32 if rehearse else 1024)
        prepare_images(pictures, root, test_fraction=0.1, vocab_size=320, workers=workers, quiet=True)
        recipe, settings = run_of(rehearse)
        command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(recipe), *settings]
        command += [f"data.root={root}", f"output_dir={output}", f"data.workers={workers}"]
        last = second_line(command, output / "metrics.jsonl", Path(folder, "said"))
    told = ("images_per_second", "data_wait", "mfu", "memory_gib")
    return {"workers": workers, "seconds": last["seconds_per_step"], **{key: last[key] for key in told}}


def second_line(command: list[str], metrics: Path, said: Path) -> dict[str, Any]:
    """Start a run and return its second line of telemetry as soon as it is there. The run's end is not waited for: it
    writes a checkpoint."""
    with open(said, "w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as run:
        try:
            while True:
                ended = run.poll() is not None
                text = metrics.read_text() if metrics.exists() else ""
                lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
                if len(steps := [line for line in lines if line["kind"] == "step"]) > 1:
                    return steps[1]
                if ended:
                    print(said.read_text()[-4000:])
                    last = said.read_text().strip().splitlines()[-1:]
                    raise UserError(f"the run ended with status {run.returncode}: {''.join(last)}")
                time.sleep(0.2)
        finally:
            run.kill()


def run_of(rehearse: bool) -> tuple[Path, list[str]]:
    """Return the recipe, and what is set over it. The second line of telemetry is without the steps that the workers
    had prepared while the run started: one each."""
    batch, steps = (8, 4) if rehearse else (VTP_BATCH["s"], 64)
    recipe = ROOT / "configs" / ("demo/vtp_emoji.yaml" if rehearse else "pretrain/vtp_s.yaml")
    return recipe, [
        "data.captions=auto", "data.streams=8", "data.shuffle_block=8", "data.prefetch=1",
        "model.text.vocab_size=null", f"train.batch_size={batch}", f"train.steps={steps}", "train.checkpoint_every=0",
        "train.optimizer.warmup_steps=0", "objectives.contrastive.micro_batch=null",
        f"objectives.self_distillation.batch={max(8, batch // 4)}", "objectives.self_distillation.micro_batch=null",
        f"objectives.reconstruction.batch={max(8, batch // 8)}", "objectives.reconstruction.micro_batch=null",
        "objectives.reconstruction.perceptual=none", f"telemetry.log_every={steps // 2}", "telemetry.pictures_every=0",
        "evaluation.at_end=false",
    ]


def write_pairs(folder: Path, count: int) -> None:
    """Write pictures with as much detail as photographs have, as JPEG files of some 30 kB, and captions."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (64, 80, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((400, 320), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(file.getvalue())
        (folder / f"{number}.txt").write_text(f"a picture of noise, number {number}")
