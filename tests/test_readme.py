"""Every command of the README has its flags and settings checked; a new kind of command fails.

``test_readme_runs`` runs what this machine can run.
"""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megavtp.config.load import load_config
from megavtp.config.schema import DEMO_CONFIG, Config
from megavtp.decoder.launcher import DECODER
from megavtp.dit.launcher import DIT
from megavtp.pretraining.launcher import PRETRAINING

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Flags of the launchers (deepspeed 0.19.8, torchrun) that the README uses, with the number of processes they imply.
LAUNCHER_FLAGS = {
    "--num_accelerators", "--num_gpus", "--hostfile",
    "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint",
}
HOSTFILE_PROCESSES = 64  # "8 nodes of 8 GPUs named in a hostfile"
SLURM_TASKS = 16  # the job script's nodes x tasks
LAUNCHERS = {f"launchers/{launcher.name}": launcher for launcher in (PRETRAINING, DECODER, DIT)}
PLAIN = {"source .venv/bin/activate"}


def commands():
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = " ".join(line.split())
            if line and not line.startswith("#"):
                found.append(line)
    return found


COMMANDS = commands()
INLINE = re.findall(r"`(make [^`]+|python tools/[^`]+|deepspeed [^`]+)`", README)


@cache
def help_text(*script):
    done = subprocess.run(
        [sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def check_make(words):
    for word in words[1:]:
        if "=" not in word:
            assert re.search(rf"^{re.escape(word)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), word
        else:
            assert word.partition("=")[0] in ("PYTHON", "VENV", "EXTRAS", "CELLS")


def check_tool(words):
    script, rest = words[1], words[2:]
    assert (ROOT / script).is_file(), script
    parts = [script]
    if rest and not rest[0].startswith("-"):
        parts.append(rest[0])  # a sub-command
    flags = set(re.findall(r"--[a-z][a-z-]*", help_text(*parts)))
    assert {w.split("=")[0] for w in rest if w.startswith("--")} <= flags


def split_launch(words):
    """(launcher's words, script, script's words)."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[1:at], words[at], words[at + 1 :]


def processes(launcher):
    flags = dict(zip(launcher[::2], launcher[1::2]))
    assert set(flags) <= LAUNCHER_FLAGS, flags
    if "--hostfile" in flags:
        return HOSTFILE_PROCESSES
    if "--nnodes" in flags:
        return int(flags["--nnodes"]) * int(flags["--nproc_per_node"])
    return int(flags.get("--num_accelerators", flags.get("--num_gpus", 1)))


def check_launch(words):
    launcher, script, rest = split_launch(words)
    if script in LAUNCHERS:
        check_run(script, rest, processes(launcher))
    else:  # a tool, or the doctor
        check_tool(["python", script, *rest])


def check_run(script, rest, world):
    launcher = LAUNCHERS[script]
    arguments = launcher.parser().parse_intermixed_args(rest)
    config = ROOT / arguments.config if arguments.config else launcher.default
    settings = load_config(config, launcher.settings, arguments.overrides, arguments.deepspeed_config)
    launcher.validate(settings, world)


def check_sbatch(words):
    assert (ROOT / words[1]).is_file(), words[1]
    check_run("launchers/pretrain.py", ["--config", *words[2:]], SLURM_TASKS)


CHECKS = {
    "make": check_make, "python": check_tool, "deepspeed": check_launch, "torchrun": check_launch,
    "sbatch": check_sbatch,
}


def test_the_readme_has_commands():
    assert len(COMMANDS) > 8 and INLINE


@pytest.mark.parametrize("command", COMMANDS + INLINE)
def test_every_command_is_one_that_would_run(command):
    if command in PLAIN:
        return
    words = shlex.split(command)
    assert words[0] in CHECKS, f"{command}: no check for this kind of command"
    CHECKS[words[0]](words)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--dry-run" in c])
def test_dry_runs_print_what_would_run(command):
    launcher, script, rest = split_launch(shlex.split(command))
    world = processes(launcher)
    done = subprocess.run(
        [sys.executable, script, *rest], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={
            "WORLD_SIZE": str(world), "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert f"layout     {world} process" in done.stdout


def test_files_and_keys_that_the_text_names_exist():
    for path in re.findall(r"`((?:configs|megavtp|tools|launchers)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
    sections = "model|objectives|data|parallel|train|telemetry|deepspeed"
    for override in re.findall(rf"`((?:{sections})\.[\w.]+=[\w.]+)`", README):
        load_config(DEMO_CONFIG, Config, [override])
    for key in set(re.findall(rf"`((?:{sections})\.[a-z_.]+)`", README)) - {"model.safetensors"}:
        value = load_config(DEMO_CONFIG, Config)
        for part in key.split("."):
            value = getattr(value, part)
