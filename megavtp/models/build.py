"""This builds a VTP in which no weight stays uninitialised, and fills one from whole tensors."""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megavtp.config.sizes import ResolvedModel
from megavtp.models.fitting import load_whole
from megavtp.models.init import initialise
from megavtp.models.vtp import OBJECTIVES, VTP
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.sharding import mark, shard_of


def build_vtp(
    config: ResolvedModel, mesh: Mesh = SINGLE, *, objectives: AbstractSet[str] = OBJECTIVES, seed: int = 0,
    device: torch.device | str = "cpu", recompute: Recompute = "none", attention: Kernel = "auto",
    max_scale: float = 100.0, compute_dtype: torch.dtype = torch.float32, frozen_encoder: bool = False,
    kind: Callable[..., VTP] = VTP,
) -> VTP:
    """Build an initialised model in float32 on ``device``; its whole weights are the same for every ``mesh``.

    ``kind`` makes it, with the same arguments as ``VTP``.

    Memory is filled with NaN before the initial values and checked after, so that no uninitialised parameter can hide.
    """
    with torch.device("meta"):
        model = kind(
            config, mesh, objectives=objectives, recompute=recompute, attention=attention, max_scale=max_scale,
            compute_dtype=compute_dtype, frozen_encoder=frozen_encoder,
        )
    with realised(model, device):
        initialise(model, config, mesh, seed)
        model.start_averages()
    return model


@contextmanager
def realised(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Give a model on the meta device memory filled with NaN; the ``with`` block must then fill every parameter."""
    shards = {name: s for name, parameter in model.named_parameters() if (s := shard_of(parameter)) is not None}
    model.to_empty(device=device)  # makes new parameter objects, without their attributes
    for name, parameter in model.named_parameters():
        if name in shards:
            mark(parameter, shards[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    yield
    missed = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    assert not missed, f"not initialised: {missed}"


def load_full(model: VTP, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole (uncut) tensors into this rank's slices, by logical name.

    ``tensors`` may leave out the teacher, which then becomes a copy of the student, and buffers, which keep their
    values. UserError names everything else that is missing, unexpected or of the wrong shape.
    """
    has_teacher = any(name.startswith("teacher.") for name in tensors)
    names = [name for name, _ in model.named_parameters() if has_teacher or not name.startswith("teacher.")]
    load_whole(model, tensors, model.mesh, names)
    if not has_teacher:
        model.start_averages()
