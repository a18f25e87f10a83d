"""A SLURM of one node on this machine, from its real daemons, with configuration, key, ports and state of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
from distributed import free_port
from launched import wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def why_not() -> str | None:
    """What is missing for it on this machine, None if nothing is."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "needs root, for slurmd"
    if (psutil.cpu_count() or 1) < 2:
        return "needs two processors, for two tasks"
    return None


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The daemons run while the context is open."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0], folder=self.folder, controller_port=free_port(),
                node_port=free_port(),
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.run("munged", "--force", f"--socket={self.folder}/munge.socket", *files)
        self.run("slurmctld")
        self.run("slurmd")
        wait_for(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%t", check=False), 60, self._logs)

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a command of SLURM, or started by it, says on stdout and stderr."""
        done = subprocess.run(
            [_find(command[0]), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**self.environment, **environment}, timeout=120,
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}"
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ..."""
        return self.run("scontrol", "show", "job", "--oneliner", job).partition("JobState=")[2].split()[0]

    def __exit__(self, *exception: object) -> None:
        self.run("scancel", "--user=root", check=False) if (self.folder / "slurmctld.pid").exists() else None
        for name in ("slurmd", "slurmctld", "munge"):
            with contextlib.suppress(FileNotFoundError, ValueError, psutil.Error):
                process = psutil.Process(int((self.folder / f"{name}.pid").read_text()))
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(15)
                    continue
                process.kill()
        time.sleep(0.1)
