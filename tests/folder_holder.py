"""Another process that has a folder for itself, for tests of who comes second."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from megavtp.data.folder_lock import FolderLock


@contextlib.contextmanager
def held(folder: Path, lives_on: float = 0.0) -> Iterator[int]:
    """Another process that holds the folder, and has a child of its own; its process id.

    ``lives_on``: seconds after which it ends by itself; 0 = when the block ends.
    """
    ready, tell = os.pipe()
    group = os.fork()
    if group == 0:
        os.setpgid(0, 0)
        FolderLock(folder, "")
        if os.fork() > 0:
            os.write(tell, b"1")
            time.sleep(lives_on or 120)
            os._exit(0)
        time.sleep(120)  # a loader worker, deaf to its parent's end
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"1"
        yield group
    finally:
        os.killpg(group, signal.SIGKILL)
        os.waitpid(group, 0)
        os.close(ready)
        os.close(tell)
