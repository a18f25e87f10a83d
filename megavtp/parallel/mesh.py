"""The process mesh: which tensor-, pipeline- and data-parallel group this rank is in.

rank = dp_rank * (pp * tp) + pp_rank * tp + tp_rank, so tensor-parallel peers are neighbours (the fastest links).
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

import numpy as np
import torch.distributed as dist

from megavtp.errors import UserError

Axis = Literal["tp", "pp", "dp", "mp"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Mesh:
    """The sizes and process groups of the three axes, and this rank's coordinates.

    ``mp`` is the model-parallel group: the tp x pp ranks that together hold one replica. A group is ``None`` where
    the axis has size 1: collectives over it are then the identity and need no ``torch.distributed``.

    ``pp_down_group``: the pipeline ranks once more, for messages to a lower rank; those to a higher one have
    ``pp_group``, so that messages of one direction never wait behind the other's. ``virtual_stages``: chunks of each
    tower on a pipeline rank. ``sequence_parallel``: the tp ranks share the tokens of a tower's blocks as well.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    mp_group: dist.ProcessGroup | None = None
    pp_down_group: dist.ProcessGroup | None = None
    virtual_stages: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def rank(self) -> int:
        return (self.dp_rank * self.pp + self.pp_rank) * self.tp + self.tp_rank

    @property
    def chunks(self) -> int:
        """The number of chunks into which each tower is cut."""
        return self.pp * self.virtual_stages

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last chunk of every tower, with the heads and the losses."""
        return self.pp_rank == self.pp - 1

    def size(self, axis: Axis) -> int:
        return self.tp * self.pp if axis == "mp" else getattr(self, axis)

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        return getattr(self, f"{axis}_group")

    def tp_part(self, total: int, what: str) -> int:
        """Return ``total / tp``. UserError if tp does not divide it; ``what`` names the quantity in the message."""
        if total % self.tp:
            raise UserError(f"{what} is {total}, which parallel.tp={self.tp} does not divide; choose a tp that does")
        return total // self.tp


SINGLE = Mesh()


def build_mesh(
    tp: int, pp: int, virtual_stages: int = 1, sequence_parallel: bool = False, timeout: timedelta | None = None
) -> Mesh:
    """Split the initialised world into a mesh; every rank must call it. The world size must divide by tp * pp.

    ``timeout`` is that of the groups' collectives; None is the backend's, which they do not take from the world.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    dp = world // (tp * pp)
    ranks_at = np.arange(dp * pp * tp).reshape(dp, pp, tp)
    lists: dict[str, list[list[int]]] = {
        "tp": ranks_at.reshape(dp * pp, tp).tolist(),
        "pp": ranks_at.swapaxes(1, 2).reshape(dp * tp, pp).tolist(),
        "dp": ranks_at.reshape(dp, pp * tp).T.tolist(),
        "mp": ranks_at.reshape(dp, pp * tp).tolist(),
    }
    lists["pp_down"] = lists["pp"]
    groups: dict[str, dist.ProcessGroup | None] = {}
    for axis, members in lists.items():
        for ranks in members:  # creation is collective: every rank creates every group, also those it is not in
            group = dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                groups[axis] = group
    return Mesh(
        tp=tp, pp=pp, dp=dp, tp_rank=rank % tp, pp_rank=rank // tp % pp, dp_rank=rank // (tp * pp),
        virtual_stages=virtual_stages, sequence_parallel=sequence_parallel,
        **{f"{axis}_group": group for axis, group in groups.items()},
    )


def members(mesh: Mesh, axis: Axis) -> list[int]:
    """Return the ranks of this rank's group along an axis, in the group's order."""
    group = mesh.group(axis)
    return [mesh.rank] if group is None else dist.get_process_group_ranks(group)
