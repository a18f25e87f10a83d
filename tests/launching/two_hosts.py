"""Two "hosts" on this machine: network namespaces with a name, an address and an ssh server of their own each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

from launched import Launched, _end_with_parent

PROGRAMS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh", "hostname", "mount")


def why_not() -> str | None:
    """What is missing for it on this machine, None if nothing is."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: openssh-server, pdsh, iproute2)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if made.returncode == 0 else f"network namespaces are not allowed here: {made.stderr.strip()}"


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class TwoHosts:
    """host-a (10.213.7.1) and host-b (10.213.7.2), one file system but for ``private``, which host-b has empty."""

    NAMES, ADDRESSES = ("host-a", "host-b"), ("10.213.7.1", "10.213.7.2")

    def __init__(self, folder: Path):
        self.folder = folder
        self.private = folder / "private"
        self._spaces = [f"{name}-{uuid.uuid4().hex[:6]}" for name in self.NAMES]
        self._servers: list[subprocess.Popen] = []

    def __enter__(self) -> TwoHosts:
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        self.private.mkdir()
        for space in self._spaces:
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
        ends = [("dev", "eth0", "netns", space) for space in self._spaces]
        _run("ip", "link", "add", "name", "eth0", "netns", ends[0][3], "type", "veth", "peer", "name", *ends[1][1:])
        for space, address in zip(self._spaces, self.ADDRESSES):
            _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
        self._ssh()
        (self.folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in self.ADDRESSES))

    def _ssh(self) -> None:
        """A server in each host; and an `ssh` in front of the real one that knows the key."""
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host_key", "key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/key.pub\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
        )
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(
            f'#!/bin/sh\nexec {_find("ssh")} -F none -i {self.folder}/key -o StrictHostKeyChecking=no '
            '-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
        )
        wrapper.chmod(0o755)
        for name, space in zip(self.NAMES, self._spaces):
            hide = f"mount -t tmpfs none {self.private} && " if name == "host-b" else ""
            script = f"{hide}hostname {name} && exec {_find('sshd')} -D -e -f {self.folder}/sshd_config"
            self._servers.append(
                subprocess.Popen(
                    [*self._inside(space), "sh", "-c", script], stderr=subprocess.DEVNULL,
                    preexec_fn=_end_with_parent,
                )
            )

    def _inside(self, space: str) -> list[str]:
        return ["ip", "netns", "exec", space, "unshare", "--uts", "--mount"]

    def launch(self, script: Path, arguments: list[str], log: Path, port: int = 29500) -> Launched:
        """`deepspeed --hostfile` on host-a, as a user would type it."""
        deadline = time.monotonic() + 20
        while any(self._ssh_fails(address) for address in self.ADDRESSES):
            assert time.monotonic() < deadline, "no ssh server"
            time.sleep(0.2)
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(self.folder / "hosts")]
        command = [*self._inside(self._spaces[0]), *runner, "--master_port", str(port), str(script), *arguments]
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return Launched(command, log, PATH=path, PYTHONPATH=":".join(filter(None, sys.path)))

    def _ssh_fails(self, address: str) -> bool:
        command = [*self._inside(self._spaces[0]), str(self.folder / "bin" / "ssh"), address, "true"]
        return subprocess.run(command, capture_output=True).returncode != 0

    def processes(self) -> list[int]:
        """Ids of all processes in both hosts, the ssh servers included."""
        found = [
            subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout
            for space in self._spaces
        ]
        return [int(pid) for text in found for pid in text.split()]

    def __exit__(self, *exception: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for server in self._servers:
            server.wait()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run([_find(command[0]), *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
