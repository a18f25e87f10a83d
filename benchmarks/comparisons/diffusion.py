"""A DiT's step beside one around diffusers' DiT, with its average: forward, loss, backward, update, average."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from torch import Tensor, nn

from benchmarks.comparisons.comparison import LR, Pair, Setting, fused_adamw
from benchmarks.gpu.steps import noise_batch
from megavtp.config.load import from_dict
from megavtp.dit.batch import LatentBatch
from megavtp.dit.config import CompleteDiTConfig, DiTConfig, complete_config
from megavtp.dit.flow_matching import flow_matching_terms, straight_path
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.validate import validate_dit
from megavtp.training.step import train_step


@contextmanager
def diffusion(setting: Setting) -> Iterator[Pair]:
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
    batch = noise_batch(config, setting.device.type == "cuda")
    recipe = DiTTraining(config, setting.device)
    recipe.build()
    passes, averaged = recipe.passes(), recipe.averaged()

    def our_step() -> None:
        train_step(
            recipe.engine, passes, batch, lr_of=lambda group: LR, averaged=averaged, follow=1 - config.ema_momentum
        )

    with closing(recipe.engine):
        yield Pair(
            f"DiT {model.width} x {model.depth}, {config.train.batch_size} latents of {model.latent_channels} x "
            f"{model.latent_size} x {model.latent_size}, flow matching",
            our_step, diffusers_step(theirs, average.step, batch, config, setting), None,
        )


def dit_config(setting: Setting) -> CompleteDiTConfig:
    width, depth, heads = setting.size((32, 2, 2), (384, 4, 6), (1152, 28, 16))
    side, channels, batch = setting.size((4, 8, 2), (16, 64, 16), (16, 64, 64))
    return complete_config(validate_dit(from_dict({
        "model": {
            "width": width, "depth": depth, "heads": heads, "latent_size": side, "latent_channels": channels,
            "num_classes": 1000,
        },
        "data": {"streams": 1}, "train": {"batch_size": batch},
        "parallel": {"precision": setting.precision, "zero_stage": 0},
    }, DiTConfig), 1))


def diffusers_step(
    model: nn.Module, follow: Callable[[list[nn.Parameter]], None], batch: LatentBatch, config: CompleteDiTConfig,
    setting: Setting,
) -> Callable[[], None]:
    parameters, own = list(model.parameters()), config.train.optimizer
    optimizer = fused_adamw(model, own)

    def step() -> None:
        data, noise, times, labels = (
            x.to(setting.device, non_blocking=True)
            for x in (batch.latents, batch.noise, batch.times, batch.conditions)
        )
        points, target = straight_path(data, noise, times)
        optimizer.zero_grad()
        with setting.autocast():
            velocity: Tensor = model(points, (times * 1000).long(), labels, return_dict=False)[0]
        terms = flow_matching_terms(velocity, target, samples_total_local=len(data))
        (terms["mse"] + config.flow_matching.cosine_weight * terms["cosine"]).backward()
        nn.utils.clip_grad_norm_(parameters, own.clip_grad)
        optimizer.step()
        follow(parameters)

    return step
