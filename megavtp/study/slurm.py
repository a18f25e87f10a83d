"""The links of a study as SLURM jobs: the batch script of each, and what stands in the queue."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavtp.errors import UserError
from megavtp.launch.rendezvous import expand_counts
from megavtp.study.config import STUDY, StudyConfig, words
from megavtp.study.links import ROOT, Link

TEMPLATE = ROOT / "launchers" / "slurm" / "study.sbatch"
_SCRIPT = "job.sbatch"  # in the link's folder; by its path the job is found in the queue
_PATIENCE = 120.0  # seconds that a program of SLURM may take


@dataclass(frozen=True)
class Job:
    number: str
    state: str  # as squeue has it, such as pending or running

    def __str__(self) -> str:
        return f"{self.state} as job {self.number}"


def script_path(link: Link) -> Path:
    return (link.folder / _SCRIPT).resolve()


def command_line(link: Link) -> str:
    """Return the line of a link's script that says what the link does."""
    return f"# {link.kind}: {shlex.join([link.script, *link.arguments])}"


def script_of(study: StudyConfig, link: Link, after: Sequence[Job]) -> str:
    """Return the batch script of a link, which waits until the jobs ``after`` have succeeded.

    UserError: the template cannot be read.
    """
    template = Path(study.slurm.template or TEMPLATE)
    try:
        lines = template.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"slurm.template = {template}: cannot be read ({error}); name a batch script") from None
    options = [
        f"--job-name={link.folder.relative_to(study.output_dir)}",
        f"--output={script_path(link).with_name('slurm-%j.out')}", "--kill-on-invalid-dep=yes",
        *(["--dependency=" + ":".join(["afterok", *(job.number for job in after)])] if after else []),
    ]
    given = (words(study, "slurm.options"), words(study, f"slurm.by_kind.{link.kind}"))
    own = [sys.executable, "-u", str(ROOT / "tools" / "study.py"), "run", str(Path(study.output_dir) / STUDY)]
    added = [
        command_line(link),
        *(f"#SBATCH {shlex.join(line)}" for line in (*given, options) if line),
        f"MEGAVTP={shlex.quote(str(ROOT))}", f"cd {shlex.quote(os.getcwd())} || exit 2",
        f"set -- {shlex.join([*own, '--link', str(link.folder)])}", "",
    ]
    # Behind the comments, as sbatch reads no options behind a command.
    begin = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    return "\n".join([*lines[:begin], *added, *lines[begin:], ""])


def slurm_launcher(study: StudyConfig) -> list[str]:
    """Return what starts a link's processes in its job. An srun is told their number, so that the link's record is."""
    first, *rest = words(study, "slurm.launcher")
    tasks = os.environ.get("SLURM_TASKS_PER_NODE") if first == "srun" else None
    return [first, *([f"--ntasks={sum(expand_counts(tasks))}"] if tasks else []), *rest]


def submit(script: Path) -> Job:
    """Submit a batch script. UserError: SLURM refuses it."""
    return Job(_ask("sbatch", "--parsable", str(script)).strip().partition(";")[0], "pending")


def cancel(job: Job) -> None:
    """Take a job out of the queue. UserError: SLURM refuses it."""
    _ask("scancel", job.number)


def check_slurm() -> None:
    """Raise UserError if this machine cannot submit jobs."""
    if shutil.which("sbatch") is None:
        raise UserError("--launch slurm: there is no sbatch here; start it on a machine that submits jobs to SLURM")


def jobs_of(links: Sequence[Link]) -> dict[Path, Job]:
    """Return the jobs of links that wait or run, by the link's folder. UserError: the queue cannot be read."""
    folders = {str(path): link.folder for link in links if (path := script_path(link)).exists()}
    if not folders:
        return {}
    found = {}
    for line in _ask("squeue", "--me", "--noheader", "--format=%A|%T|%o").splitlines():
        number, state, command = line.split("|", 2)
        if command in folders and state != "COMPLETING":  # whose link has ended
            found[folders[command]] = Job(number, state.lower())
    return found


def _ask(program: str, *arguments: str) -> str:
    """Return what a program of SLURM prints. UserError: it cannot be run, or it fails."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{program} cannot be run ({error}); is SLURM installed, and does it answer?") from None
    if done.returncode != 0:
        said = [line.removeprefix(f"{program}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise UserError(f"{shlex.join([program, *arguments])}: {'; '.join(filter(None, said))}")
    return done.stdout
