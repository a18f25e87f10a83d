"""Tensor-parallel ranks get equal shares; a size that cannot be divided is refused early."""

from __future__ import annotations

from megavtp.errors import UserError
from megavtp.parallel.mesh import Mesh


def share(total: int, mesh: Mesh, what: str) -> int:
    """Return ``total / tp``. UserError if tp does not divide it; ``what`` names the quantity in the message."""
    if total % mesh.tp:
        raise UserError(f"{what} is {total}, which parallel.tp={mesh.tp} does not divide; choose a tp that does")
    return total // mesh.tp
