"""Locks that processes wait for, also those on other machines that share the file system."""

import contextlib
import errno
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megavtp.training.output_dir import writing

_POLL = 2.0  # seconds between two tries

log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(path: Path, busy: str) -> Iterator[int]:
    """Hold the lock of a file, which is made with its folder, and yield its descriptor; children may inherit it.

    While another process holds it, this one waits, and says once that it is ``busy``. UserError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while not _locked(path, descriptor):
            if not told:
                print(f"{path.parent}: {busy}; waiting for it", file=sys.stderr, flush=True)
            told = True
            time.sleep(_POLL)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(path: Path, descriptor: int) -> bool:
    """Try to lock; on a file system without locks, warn and go on."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: no lock on this file system (%s): start no two commands for it at once", path, error.strerror)
    return True
