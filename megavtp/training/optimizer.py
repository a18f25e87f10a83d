"""AdamW parameter groups: no decay on vectors and scalars, one learning-rate scale per tower."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from megavtp.config.run import OptimizerConfig

_TOWER_OF = {
    "trunk": "vision", "visual_proj": "vision", "pixel_decoder": "decoder", "dino_head": "dino_head",
    "discriminator": "discriminator",
}


def tower_of(name: str) -> str:
    """Return the tower of a logical parameter name; the caption side and the logit scale are ``text``."""
    return _TOWER_OF.get(name.split(".")[0], "text")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, tower_of: Callable[[str], str] = tower_of
) -> list[dict]:
    """Group the trainable parameters; each group is of one ``tower`` (in pre-training one of ``config.sizes.TOWERS``).

    ``prototypes`` marks the DINO head's last layer, which starts frozen, ``logit_scale`` the contrastive temperature,
    which has a ceiling.

    A vector has at most one dimension longer than 1: class token and prototype gains do not decay either.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        tower = tower_of(name)
        shared = {
            "weight_decay": config.weight_decay if sum(size > 1 for size in parameter.shape) > 1 else 0.0,
            "lr_scale": config.lr_scale.get(tower, 1.0), "tower": tower,
            "prototypes": name.startswith("dino_head.last_layer."), "logit_scale": name == "logit_scale",
        }
        groups.setdefault(tuple(shared.values()), {"params": [], **shared})["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, zero_stage: int = 0,
    tower_of: Callable[[str], str] = tower_of, max_logit_scale: float = math.inf,
) -> torch.optim.Optimizer:
    """Make AdamW over the groups: NVIDIA apex's fused one where it is installed for this GPU, else torch's fused one.

    No update takes the logit scale above ``max_logit_scale``.

    Apex counts updates by group. ZeRO stage 3 steps a large group in parts, which would count each part as an update,
    so there it is always torch's.
    """
    groups = parameter_groups(named, config, tower_of)
    beta1, beta2 = config.betas
    fused = find_apex_adam() if groups[0]["params"][0].is_cuda and zero_stage < 3 else None
    if fused is not None:
        optimizer = fused(groups, adam_w_mode=True, lr=config.lr, betas=(beta1, beta2), eps=config.eps)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, lr=config.lr, betas=(beta1, beta2), eps=config.eps)
    optimizer.register_step_post_hook(partial(_cap_logit_scale, max_logit_scale))
    return optimizer


@torch.no_grad()
def _cap_logit_scale(ceiling: float, optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Clamp the logit scale where the optimizer updates it: in the parameter, or in ZeRO's flat partition, from which
    the engine then fills the parameter. OpenCLIP clamps it, too: otherwise it would drift above the ceiling, where the
    loss does not change, and take as long to come down."""
    for group in optimizer.param_groups:
        if group["logit_scale"]:
            for values in group["params"]:
                values.clamp_(max=ceiling)


def find_apex_adam() -> type | None:
    """Return apex's fused AdamW if it is installed with its kernels."""
    # `import apex` alone proves nothing, as the package of that name on PyPI is another project.
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedAdam
    except (ImportError, OSError):
        return None
    return FusedAdam if multi_tensor_applier.available else None  # False where apex was installed without its kernels
