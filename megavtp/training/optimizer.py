"""AdamW parameter groups: no decay on vectors and scalars, one learning-rate scale per tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from megavtp.config.schema import OptimizerConfig

_TOWER_OF = {"trunk": "vision", "visual_proj": "vision", "pixel_decoder": "decoder", "dino_head": "dino_head"}


def tower_of(name: str) -> str:
    """The tower of a logical parameter name; the caption side and the logit scale are ``text``."""
    return _TOWER_OF.get(name.split(".")[0], "text")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, tower_of: Callable[[str], str] = tower_of
) -> list[dict]:
    """Groups of the trainable parameters, each of one ``tower`` (in pre-training of ``config.sizes.TOWERS``).

    ``prototypes`` marks the DINO head's last layer, which starts frozen.

    A vector has at most one dimension longer than 1: class token and prototype gains do not decay either.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        tower = tower_of(name)
        decay = config.weight_decay if sum(size > 1 for size in parameter.shape) > 1 else 0.0
        prototypes = name.startswith("dino_head.last_layer.")
        group = groups.setdefault(
            (tower, decay, prototypes),
            {
                "params": [], "weight_decay": decay, "lr_scale": config.lr_scale.get(tower, 1.0), "tower": tower,
                "prototypes": prototypes,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, zero_stage: int = 0,
    tower_of: Callable[[str], str] = tower_of,
) -> torch.optim.Optimizer:
    """AdamW over the groups: NVIDIA apex's fused one where it is installed for this GPU, else torch's fused one.

    Apex counts updates by group. ZeRO stage 3 steps a large group in parts, which would count each part as an update,
    so there it is always torch's.
    """
    groups = parameter_groups(named, config, tower_of)
    settings = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    on_gpu = groups[0]["params"][0].is_cuda
    fused = _apex_adam() if on_gpu and zero_stage < 3 else None
    if fused is not None:
        return fused(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _apex_adam() -> type | None:
    # `import apex` alone proves nothing: the package of that name on PyPI is another project.
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedAdam
    except (ImportError, OSError):
        return None
    return FusedAdam if multi_tensor_applier.available else None  # False where apex was installed without its kernels
