"""A lock on the folder that a run writes to. The system releases it when the process ends, however it ends."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from pathlib import Path

from megavtp.errors import UserError
from megavtp.json_file import form, parse_json

LOCK_FILE = "run.lock"
_PATIENCE = 10.0  # seconds to wait for the lock: a run that was just killed may need some to end
_COMMAND = 300  # characters of the owner's command that a message shows

log = logging.getLogger(__name__)


@form
class _Owner:
    host: str
    pid: int
    started: str
    command: str


class FolderLock:
    """A lock of a folder that exists, held until ``close``, or until the process ends.

    It is a record lock (fcntl), not one of flock, so that forked children such as loader workers, which may outlive a
    killed run for a while, do not hold it. The system drops it when this process closes any descriptor of the file,
    so nothing else here opens the file.

    Raises ``UserError`` if another run holds it; ``remedy`` says what the user can do besides waiting for that one.
    Raises ``OSError`` if the folder cannot be written.
    """

    def __init__(self, folder: Path, remedy: str):
        self.path = folder / LOCK_FILE
        self._remedy = remedy
        self._descriptor: int | None = self._acquire(_PATIENCE)

    def renew(self) -> bool:
        """Make and lock the folder again if it was deleted or moved away; return whether it was. ``UserError`` if
        another run has taken the place, ``OSError`` if it cannot be made."""
        if self._descriptor is None or leads_to(self.path, self._descriptor):
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old, self._descriptor = self._descriptor, self._acquire(0)
        os.close(old)
        return True

    def close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                if leads_to(self.path, self._descriptor):
                    self.path.unlink()  # while it is locked, so that a waiting run sees that the file is gone
            os.close(self._descriptor)
            self._descriptor = None

    def _acquire(self, patience: float) -> int:
        deadline = time.monotonic() + patience
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    log.warning(
                        "%s: no lock on this file system (%s): see to it yourself that no other run writes there",
                        self.path.parent, error.strerror,
                    )
                    break
                owner = _owner(descriptor)
                os.close(descriptor)
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"{self.path.parent} is in use by another run ({owner}); wait for it, end it, or {self._remedy}"
                    ) from None
                time.sleep(0.1)
            else:
                if leads_to(self.path, descriptor):
                    break
                os.close(descriptor)  # its owner has just removed it
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        me = _Owner(socket.gethostname(), os.getpid(), started, shlex.join(sys.argv))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(vars(me)).encode(), 0)
        return descriptor


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is the open file, which may have been deleted, moved or replaced since."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE comes from network file systems
            return False
        raise


def _owner(descriptor: int) -> str:
    try:
        owner = parse_json(os.pread(descriptor, 1 << 16, 0), _Owner, LOCK_FILE, "")
    except (OSError, UserError):
        return "which has not told of itself yet"
    return f"host {owner.host}, pid {owner.pid}, since {owner.started}: {owner.command[:_COMMAND]}"
