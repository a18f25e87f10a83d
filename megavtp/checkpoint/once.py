"""The ranks open a checkpoint in a collective call: rank 0 alone verifies it, the others open the files they read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megavtp.checkpoint.reading import Checkpoint, is_checkpoint, open_checkpoint
from megavtp.parallel.collectives import all_gather_object
from megavtp.parallel.looking import look_once


def open_once(path: str | Path) -> Checkpoint | None:
    """Open the native checkpoint at ``path`` on every rank; None if there is something else. UserError if it is
    damaged."""
    return look_once(lambda: open_checkpoint(path) if is_checkpoint(path) else None)


@contextmanager
def opened_once(path: str | Path) -> Iterator[Checkpoint | None]:
    """Give what ``open_once`` returns; it is closed when all ranks have left the block, with an error or without."""
    checkpoint = open_once(path)
    try:
        yield checkpoint
    finally:
        all_gather_object(None)  # only now may it be pruned by the run that wrote it
        if checkpoint is not None:
            checkpoint.close()
