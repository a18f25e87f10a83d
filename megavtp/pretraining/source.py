"""The data of a recipe that names their source, made when a run first needs them."""

from pathlib import Path

from megavtp.config.sizes import ResolvedConfig
from megavtp.data.sources.named import SOURCES
from megavtp.errors import UserError
from megavtp.parallel.collectives import together


def make_source(config: ResolvedConfig, rank: int) -> None:
    """Make ``data.source`` into ``data.root`` unless something is there. Every rank calls it. UserError."""
    name, root = config.data.source, Path(config.data.root)
    if name is None:
        return

    def make() -> None:
        if rank == 0 and not root.exists():
            SOURCES[name](root)

    together(make)
    if not root.exists():
        raise UserError(f"{root} is not visible on this machine: data.root must be on a shared file system")
