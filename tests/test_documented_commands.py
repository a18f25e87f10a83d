"""Every command of the documentation has its flags and settings checked; a new kind of command fails.

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
from megavtp.dit.config import DiTConfig
from megavtp.dit.launcher import DIT
from megavtp.pretraining.launcher import PRETRAINING

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/*.md")]

# Flags of the launchers (deepspeed 0.19.8, torchrun) that are used, with the number of processes they imply.
LAUNCHER_FLAGS = {
    "--num_accelerators", "--num_gpus", "--hostfile",
    "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint",
}
HOSTFILE_PROCESSES = 64  # "8 nodes of 8 GPUs named in a hostfile"
SLURM_TASKS = 16  # the job script's nodes x tasks, and those of 4 x 4
USERS_RECIPE = "my.yaml"
LAUNCHERS = {f"launchers/{launcher.name}": launcher for launcher in (PRETRAINING, DECODER, DIT)}
RECIPES = [(DEMO_CONFIG, Config), (ROOT / "configs" / "dit" / "dit_b.yaml", DiTConfig)]
OTHERS = {"source", "pip", "cp", "tail"}  # programs of which nothing here decides whether they run


def commands(page):
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = " ".join(line.split())
            if line and not line.startswith("#"):
                found.append(line)
    return found


COMMANDS = commands(ROOT / "README.md")
INLINE = re.findall(r"`(make [^`]+|python tools/[^`]+|deepspeed [^`]+)`", README)
ALL = sorted({command for page in PAGES for command in commands(page)} | set(INLINE))


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
            assert word.partition("=")[0] in ("PYTHON", "VENV", "EXTRAS", "CELLS", "JOBS")


def check_python(words):
    if words[1:3] == ["-m", "pytest"]:
        for word in words[3:]:
            assert "/" not in word or (ROOT / word.partition("::")[0]).exists(), word
    else:
        check_tool(words)


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
    config = ROOT / arguments.config if arguments.config not in (None, Path(USERS_RECIPE)) else launcher.default
    settings = load_config(config, launcher.settings, arguments.overrides, arguments.deepspeed_config)
    launcher.validate(settings, world)


def check_sbatch(words):
    script, config, *settings = (word for word in words[1:] if not word.startswith("-"))
    assert (ROOT / script).is_file(), script
    check_run("launchers/pretrain.py", ["--config", config, *settings], SLURM_TASKS)


def check_srun(words):
    check_python(words[words.index("python") :])


CHECKS = {
    "make": check_make, "python": check_python, "deepspeed": check_launch, "torchrun": check_launch,
    "sbatch": check_sbatch, "srun": check_srun,
}


def test_the_readme_has_commands():
    assert len(COMMANDS) > 8 and INLINE


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_one_that_would_run(command):
    words = shlex.split(command, comments=True)
    if re.match(r"[A-Z]+=", words[0]):  # a variable of the environment
        words = words[1:]
    if words[0] in OTHERS:
        return
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_keys_that_the_text_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:configs|megavtp|tools|launchers|tests|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    sections = "model|objectives|data|parallel|train|telemetry|flow_matching"
    for key, value in re.findall(rf"`((?:{sections})\.[a-z0-9_.]+)(?:=([\w.]+))?`", text):
        if key != "model.safetensors":
            recipes = [recipe for recipe in RECIPES if has_key(recipe, key)]
            assert recipes, key
            if value:
                load_config(*recipes[0], [f"{key}={value}"])


@cache
def has_key(recipe, key):
    value = load_config(*recipe)
    for part in key.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
