"""The model of a native checkpoint, without engine or optimizer."""

from __future__ import annotations

from pathlib import Path

import torch

from megavtp.checkpoint.store import open_checkpoint
from megavtp.config.load import from_dict
from megavtp.config.schema import Config
from megavtp.config.share import share
from megavtp.models.build import build_vtp, load_full
from megavtp.models.vtp import VTP

_PREFIX = "model/"


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[VTP, Config]:
    """The whole model (student and teacher) of a checkpoint of any layout, computing in float32, and its config.

    Raises:
        UserError: the checkpoint is missing, corrupt, or does not hold the model of its config.
    """
    with open_checkpoint(path) as checkpoint:
        config = from_dict(checkpoint.meta["config"])
        model = build_vtp(
            config.model, objectives=frozenset(share(config, dp=1).passes), seed=config.seed, device=device,
            max_scale=config.objectives.contrastive.max_scale,
        )
        names = [name for name in checkpoint.names if name.startswith(_PREFIX)]
        load_full(model, {name.removeprefix(_PREFIX): checkpoint.tensor(name) for name in names})
    return model.eval(), config
