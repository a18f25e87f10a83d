"""Initial values are the same on every layout.

Every full tensor is drawn from its own generator, seeded by (seed, logical name), and each rank keeps its cut. The
distributions are those of the official training class: a truncated normal (0.02 by default) for ViT linears, CLIP's
own scheme (arXiv 2103.00020) for the text tower, torch's defaults for the rest.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from megavtp.config.sizes import ResolvedModel, Tower, feature_width
from megavtp.models.vtp import DEFAULT_LOGIT_SCALE
from megavtp.nn.rope import reset_rope
from megavtp.nn.seeded import named_generator
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.sharding import cut, shard_of, whole_shape

AVERAGES = ("teacher.", "averaged_decoder.")  # these start as copies

Fill = Callable[[Tensor, torch.Generator], Tensor]


def constant(value: float) -> Fill:
    return lambda t, g: t.fill_(value)


def normal(std: float) -> Fill:
    return lambda t, g: t.normal_(0.0, std, generator=g)


def _uniform(fan_in: int) -> Fill:
    """Torch's default for linears and convolutions."""
    bound = 1 / math.sqrt(fan_in)
    return lambda t, g: t.uniform_(-bound, bound, generator=g)


def _uniform_by_shape() -> Fill:
    """Torch's default, for a weight whose inputs are all of its dimensions but the first."""
    return lambda t, g: _uniform(t[0].numel())(t, g)


def _trunc_normal(std: float) -> Fill:
    return lambda t, g: nn.init.trunc_normal_(t, std=std, generator=g)


def _rules(config: ResolvedModel) -> list[tuple[str, Fill]]:
    """Pair patterns of the whole logical name with distributions; the first match counts."""
    width = config.text.width
    residual = width**-0.5 * (2 * config.text.depth) ** -0.5
    towers: dict[str, Tower] = {"trunk": config.vision, "pixel_decoder": config.decoder, "text": config.text}
    return [
        (r".*norm\w*\.weight", constant(1.0)),
        (r".*norm\w*\.bias", constant(0.0)),
        *[(rf"{name}\..*\.gamma", constant(tower.layer_scale or 0.0)) for name, tower in towers.items()],
        (r"trunk\.cls_token", normal(0.02)),
        (r"trunk\.mask_token", constant(0.0)),
        (r"trunk\.patch_embed\.proj\.(weight|bias)", _uniform(3 * config.patch_size**2)),
        (r"text\.token_embedding\.weight", normal(0.02)),
        (r"text\.positional_embedding", normal(0.01)),
        (r"text\.blocks\.\d+\.attn\.qkv\.weight", normal(width**-0.5)),
        (r"text\.blocks\.\d+\.(attn\.proj|mlp\.fc2)\.weight", normal(residual)),
        (r"text\.blocks\.\d+\.mlp\.fc1\.weight", normal((2 * width) ** -0.5)),
        (r"text\.projection\.weight", normal(width**-0.5)),
        (r"visual_proj\.weight", _uniform(feature_width(config))),
        (r"logit_scale", constant(config.init_logit_scale or DEFAULT_LOGIT_SCALE)),
        (r"logit_bias", constant(config.init_logit_bias or 0.0)),
        (r"dino_head\.last_layer\.weight_g", constant(1.0)),
        (r"dino_head\.last_layer\.weight_v", _uniform(config.dino_head.bottleneck)),
        (r"discriminator\..*\.weight", _uniform_by_shape()),
        (r".*\.bias", constant(0.0)),
        (r"(trunk|pixel_decoder|dino_head)\..*\.weight", _trunc_normal(config.init_std)),
    ]


def initialise(model: nn.Module, config: ResolvedModel, mesh: Mesh, seed: int) -> None:
    """Fill the RoPE buffers of a VTP (or of a part with the same names) and every parameter that is no average."""
    trained = ((name, p) for name, p in model.named_parameters() if not name.startswith(AVERAGES))
    fill_parameters(trained, _rules(config), mesh, seed)
    reset_rope(model)


def fill_parameters(
    named: Iterable[tuple[str, nn.Parameter]], rules: Sequence[tuple[str, Fill]], mesh: Mesh, seed: int
) -> None:
    """Fill parameters by the first of the ``rules`` (pattern of the whole logical name, distribution) that matches."""
    compiled = [(re.compile(pattern), fill) for pattern, fill in rules]
    for name, parameter in named:
        fill = next((fill for pattern, fill in compiled if pattern.fullmatch(name)), None)
        assert fill is not None, f"no initial distribution for {name}"
        shard = shard_of(parameter)
        with torch.no_grad():
            empty = torch.empty(whole_shape(parameter.shape, shard, mesh.tp))
            whole = fill(empty, named_generator(f"init/{seed}/{name}"))
            parameter.copy_(cut(whole, shard, mesh.tp_rank, mesh.tp))
