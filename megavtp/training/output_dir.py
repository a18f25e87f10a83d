"""The folder that a run writes to."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from megavtp.config.load import to_yaml
from megavtp.data.files import write_atomic
from megavtp.data.folder_lock import FolderLock
from megavtp.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def writing(what: Path | str, remedy: str = "set output_dir") -> Iterator[None]:
    """Write in here what belongs to a run: an OSError becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what}: cannot be written ({error.strerror or error}); free disk space or {remedy}"
        ) from error


class OutputDir:
    """Makes ``output_dir`` and, on the main rank, locks it against other runs until the end of a ``with`` block.

    Nothing in it changes before ``begin``.

    Raises:
        UserError: it cannot be written, or another run has locked it.
    """

    def __init__(self, config: Any, is_main: bool):
        self._config, self._folder = config, Path(config.output_dir)
        self._lock: FolderLock | None = None
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            if is_main:
                self._lock = FolderLock(self._folder, "set another output_dir")

    def begin(self) -> None:
        """Write ``config.yaml``, once nothing can refuse the run any more."""
        if self._lock is not None:
            with self._writing():
                write_atomic(self._folder / "config.yaml", to_yaml(self._config).encode())

    def keep(self) -> None:
        """Make the folder anew if it was deleted or moved away: the run's state may exist nowhere else."""
        with self._writing():
            renewed = self._lock is not None and self._lock.renew()
        if renewed:
            log.warning("%s was deleted or moved away: it is made anew, and the run goes on there", self._folder)
            self.begin()

    def __enter__(self) -> "OutputDir":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"output_dir = {self._folder}", "set another one")
