"""The mesh in the words of Megatron's model-parallel unit, which DeepSpeed asks for groups and ranks."""

from __future__ import annotations

import torch.distributed as dist

from megavtp.parallel.mesh import Mesh


class Mpu:
    """Answers what DeepSpeed asks of a model-parallel unit from the mesh.

    The model-parallel group is the tp x pp ranks of one replica, and the model-parallel rank counts over both: the
    gradient norm is summed over that group.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        alone = None
        # DeepSpeed needs a group also for an axis of size 1, and every rank takes part in creating each one.
        for rank in range(mesh.world_size):
            group = dist.new_group([rank])
            if rank == mesh.rank:
                alone = group
        self._groups = {axis: mesh.group(axis) or alone for axis in ("tp", "pp", "dp", "mp")}

    def get_data_parallel_group(self):
        return self._groups["dp"]

    def get_data_parallel_rank(self):
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self):
        return self._mesh.dp

    def get_model_parallel_group(self):
        return self._groups["mp"]

    def get_model_parallel_rank(self):
        return self._mesh.pp_rank * self._mesh.tp + self._mesh.tp_rank

    def get_model_parallel_world_size(self):
        return self._mesh.pp * self._mesh.tp

    def get_tensor_model_parallel_group(self):
        return self._groups["tp"]

    def get_tensor_model_parallel_rank(self):
        return self._mesh.tp_rank

    def get_tensor_model_parallel_world_size(self):
        return self._mesh.tp

    def get_pipeline_model_parallel_group(self):
        return self._groups["pp"]

    def get_pipeline_model_parallel_rank(self):
        return self._mesh.pp_rank

    def get_pipeline_model_parallel_world_size(self):
        return self._mesh.pp
