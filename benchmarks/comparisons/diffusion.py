"""A DiT's step beside one around another library's DiT, with its average: forward, loss, backward, update, average."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.comparisons.comparison import LR, Pair, Setting, step_of, steps_differ
from benchmarks.gpu.steps import noise_batch
from megavtp.config.load import from_dict
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.flow_matching import flow_matching_terms, straight_path
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.validate import validate_dit
from megavtp.models.fitting import copy_whole
from megavtp.training.step import train_step

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # of latents, times from 0 to 1, and labels


@contextmanager
def diffusers_dit(setting: Setting) -> Iterator[Pair]:
    """diffusers has the first DiT: no rotary positions, and a plain feed-forward network of as many weights."""
    from diffusers import DiTTransformer2DModel
    from diffusers.training_utils import EMAModel

    config = dit_config(setting)
    model = config.model
    theirs = DiTTransformer2DModel(
        num_attention_heads=model.heads, attention_head_dim=model.width // model.heads, num_layers=model.depth,
        in_channels=model.latent_channels, sample_size=model.latent_size, patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
    ).to(setting.device)
    average = EMAModel(theirs.parameters(), decay=config.ema_momentum, foreach=True)
    average.to(setting.device)

    def velocity(points: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        return theirs(points, (times * 1000).long(), labels, return_dict=False)[0]

    with dit_pair(config, setting, theirs, velocity, lambda: average.step(theirs.parameters()), same=False) as pair:
        yield pair


@contextmanager
def lightningdit(setting: Setting, compiled: bool) -> Iterator[Pair]:
    """LightningDiT's parts are decorated with torch.compile. Without ``compiled`` they run as they are written."""
    from models.lightningdit import LightningDiT

    config = dit_config(setting, "blocks" if compiled else "none")
    model = config.model
    theirs = LightningDiT(
        input_size=model.latent_size, patch_size=model.patch_size, in_channels=model.latent_channels,
        hidden_size=model.width, depth=model.depth, num_heads=model.heads, num_classes=model.num_classes,
        use_swiglu=True, use_rope=True, use_rmsnorm=True,
    ).to(setting.device)
    theirs.y_embedder.dropout_prob = 0.0  # both would drop other labels
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)  # a new model's output is 0, whatever its blocks do
    average = deepcopy(theirs)

    def follow() -> None:  # its training loop does it so
        with torch.no_grad():
            for averaged, parameter in zip(average.parameters(), theirs.parameters(), strict=True):
                averaged.mul_(config.ema_momentum).add_(parameter, alpha=1 - config.ema_momentum)

    stance = torch.compiler.set_stance("default" if compiled else "force_eager")
    with stance, dit_pair(config, setting, theirs, theirs, follow, same=True) as pair:
        yield pair


def dit_config(setting: Setting, compile: str = "auto") -> CompleteDiTConfig:
    width, depth, heads = setting.size((32, 2, 2), (384, 4, 6), (1152, 28, 16))
    side, channels, batch = setting.size((4, 8, 2), (16, 64, 16), (16, 64, 64))
    return complete_config(validate_dit(from_dict({
        "model": {
            "width": width, "depth": depth, "heads": heads, "latent_size": side, "latent_channels": channels,
            "num_classes": 1000,
        },
        "data": {"streams": 1}, "train": {"batch_size": batch},
        "parallel": {"precision": setting.precision, "zero_stage": 0, "compile": compile},
    }, DiTConfig), 1))


@contextmanager
def dit_pair(
    config: CompleteDiTConfig, setting: Setting, theirs: nn.Module, velocity: Velocity, follow: Callable[[], None],
    same: bool,
) -> Iterator[Pair]:
    """``same``: the rival is the same function of the same weights."""
    model = config.model
    batch = noise_batch(config, setting.device.type == "cuda")
    recipe = DiTTraining(config, setting.device)
    recipe.build()
    if same:
        copy_whole(dict(recipe.model.dit.named_parameters()), theirs.state_dict(), recipe.mesh)
        recipe.model.start_average()
    passes, averaged = recipe.passes(), recipe.averaged()

    def our_step() -> Tensor:
        terms, _ = train_step(
            recipe.engine, passes, batch, lr_of=lambda group: LR, averaged=averaged, follow=1 - config.ema_momentum
        )
        return terms["flow_matching/mse"] + config.flow_matching.cosine_weight * terms["flow_matching/cosine"]

    their_step = step_of(theirs, rival_loss(velocity, batch, config, setting), config.train.optimizer, follow)
    with closing(recipe.engine):
        yield Pair(
            f"DiT {model.width} x {model.depth}, {config.train.batch_size} latents of {model.latent_channels} x "
            f"{model.latent_size} x {model.latent_size}, flow matching",
            our_step, their_step, steps_differ(our_step, their_step) if same else None,
        )


def rival_loss(
    velocity: Velocity, batch: LatentBatch, config: CompleteDiTConfig, setting: Setting
) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        data, noise, times, labels = (
            x.to(setting.device, non_blocking=True)
            for x in (batch.latents, batch.noise, batch.times, batch.conditions)
        )
        points, target = straight_path(data, noise, times)
        with setting.autocast():
            predicted = velocity(points, times, labels)
        terms = flow_matching_terms(predicted, target, samples_total_local=len(data))
        return terms["mse"] + config.flow_matching.cosine_weight * terms["cosine"]

    return loss
