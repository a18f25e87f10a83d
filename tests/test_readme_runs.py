"""The README's commands, in its order and from its text, in a folder that has only what a clone has and some photos.

Each gets settings at its end that make it short. What cannot run here is named, and has its words checked in
``test_documented_commands``; a new command has to be put into one of the two lists.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from distributed import free_port
from launched import ROOT, Launched
from PIL import Image
from test_documented_commands import COMMANDS

_NO_EXTRAS = "telemetry.pictures_every=0 evaluation.at_end=false data.workers=0"
_DEMO = (
    "train.steps=2 train.optimizer.warmup_steps=1 train.batch_size=8 objectives.self_distillation.batch=8 "
    f"objectives.reconstruction.batch=8 {_NO_EXTRAS}"
)
_SMALL = (
    "objectives.contrastive.micro_batch=null objectives.self_distillation.micro_batch=null "
    "objectives.reconstruction.micro_batch=null train.steps=1 train.optimizer.warmup_steps=0 train.batch_size=16 "
    "objectives.self_distillation.batch=16 "
    "objectives.reconstruction.batch=16 objectives.reconstruction.perceptual=none model.image_size=32 "
    "model.vision.width=64 model.vision.depth=1 model.vision.heads=2 model.text.width=64 model.text.depth=1 "
    "model.text.heads=2 model.decoder.width=64 model.decoder.depth=1 model.decoder.heads=2 "
    "model.dino_head.prototypes=64 data.augment.global_size=32 data.augment.local_size=16 "
    f"data.augment.local_crops=2 {_NO_EXTRAS}"
)
_VTP_S = "deepspeed --num_gpus 1 launchers/pretrain.py --config configs/pretrain/vtp_s.yaml "

# Beginning of a command -> what is put at its end. The longest beginning that fits counts.
SHORT = {
    "deepspeed --num_accelerators 2 launchers/pretrain.py": _DEMO,
    "python tools/prepare_data.py images": "",
    "python tools/prepare_data.py check": "",
    f"{_VTP_S}--dry-run": "",
    _VTP_S: _SMALL,
    "deepspeed --num_accelerators 2 launchers/pretrain.py --dry-run": f"{_DEMO} output_dir=runs/two",
    "python tools/convert_checkpoint.py --from runs/demo": "",
    "deepspeed --num_accelerators 2 tools/extract_latents.py": "--split test --no-flip",
    "deepspeed --num_accelerators 2 launchers/train_dit.py": "train.steps=2 train.optimizer.warmup_steps=1 data.flip=0",
    "deepspeed --num_accelerators 2 tools/sample.py": "--per-class 1 --steps 2",
    "deepspeed --num_accelerators 2 tools/evaluate.py generation": "--samples 8 --reference-samples 16 --steps 2",
    "python tools/evaluate.py --checkpoint": "--max-samples 16",
    "python tools/report.py": "",
    "python tools/study.py plan": "",
}
NOT_HERE = {
    "make ": "these install, or run what takes many minutes",
    "source ": "of a shell",
    "deepspeed --num_gpus 8": "eight GPUs",
    "deepspeed --hostfile": "several machines; tests/launching has some of its own",
    "torchrun --nnodes 8": "several machines",
    "sbatch ": "tests/launching has a SLURM of its own",
    "python tools/plan.py": "a search of a minute; tests/planning has shorter ones",
    "python tools/study.py run": "hours; tests/study runs one with a stand-in for its commands",
    "python tools/convert_checkpoint.py --from VTP-Large": "the released weights",
}
LEAVES = (
    "data/emoji/train/index.json", "data/photos/captions.model", "runs/demo/metrics.jsonl", "vtp-hf/model.safetensors",
    "runs/demo_dit/checkpoints/latest", "samples.png", "metrics.json", "grid.png", "report.html",
)


def beginning(command: str, table: dict[str, str]) -> str | None:
    return max((start for start in table if command.startswith(start)), key=len, default=None)


def photos(folder: Path) -> None:
    """Two classes of small pictures."""
    for kind, color in (("red_square", (200, 0, 0)), ("blue_square", (0, 0, 200))):
        (folder / kind).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (24 + i, 24), color).save(folder / kind / f"{i}.png")


def on_this_machine(command: str) -> list[str]:
    """The command with this interpreter, the deepspeed launcher's on a port of its own, and short."""
    program, *words = shlex.split(f"{command} {SHORT[beginning(command, SHORT)]}")
    if program == "python":
        return [sys.executable, *words]
    assert program == "deepspeed"
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), *words]


def test_every_command_is_run_or_has_a_reason_not_to() -> None:
    for command in COMMANDS:
        assert (beginning(command, SHORT) is None) != (beginning(command, NOT_HERE) is None), command
    for table in (SHORT, NOT_HERE):
        assert {beginning(command, table) for command in COMMANDS} - {None} == table.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run_one_after_another(tmp_path: Path) -> None:
    for part in ("configs", "launchers", "tools"):
        (tmp_path / part).symlink_to(ROOT / part)
    photos(tmp_path / "photos")
    for number, command in enumerate(c for c in COMMANDS if beginning(c, SHORT)):
        with Launched(on_this_machine(command), tmp_path / f"{number}.log") as launched:
            launched.wait_until_gone(300)
        assert launched.process.returncode == 0, f"{command}\n{launched.output}"
        assert "Traceback" not in launched.output, f"{command}\n{launched.output}"
    for path in LEAVES:
        assert (tmp_path / path).exists(), path
