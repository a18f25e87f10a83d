"""A page of text about a run: sizes, batches, layout, schedule. It allocates no model and reads no data."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from megavtp.config.run import OptimizerConfig, ParallelConfig
from megavtp.config.share import PassShare, share
from megavtp.config.sizes import GLOBAL_CROPS, ResolvedConfig, adversarial_starts, contrastive_size
from megavtp.models.feature_networks import known_widths
from megavtp.models.second_stage import SecondStageVTP
from megavtp.planning.flops import patches_of

_PARTS = ("frozen_encoder", "vision", "text", "decoder", "averaged_decoder", "dino_head", "discriminator", "teacher")
_PART_OF = {
    "trunk": "vision", "pixel_decoder": "decoder", "averaged_decoder": "averaged_decoder", "dino_head": "dino_head",
    "discriminator": "discriminator", "teacher": "teacher",
}
_UNTRAINED = ("teacher", "frozen_encoder", "averaged_decoder")


def parameter_counts(config: ResolvedConfig) -> dict[str, int]:
    """Count the parameters of each tower that a valid ``config`` trains, of the averages, of a frozen encoder.

    They are those of the model itself, on the meta device. ``text`` includes the projections into the shared space and
    the temperature. A vocabulary that the tokenizer decides counts as empty; a discriminator on a ViT of timm is not
    counted.
    """
    text = replace(config.model.text, vocab_size=config.model.text.vocab_size or 0)
    frozen_encoder = config.objectives.reconstruction.frozen_encoder
    with torch.device("meta"):
        model = SecondStageVTP(
            replace(config.model, text=text), objectives=frozenset(share(config, 1).passes),
            frozen_encoder=frozen_encoder, widths=known_widths(config.objectives.adversarial, config.model),
            average=config.objectives.reconstruction.decoder_momentum > 0,
        )
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = _PART_OF.get(name.split(".")[0], "text")
        if part == "vision" and frozen_encoder:
            part = "frozen_encoder"
        if parameter.requires_grad or part in _UNTRAINED:
            counts[part] += parameter.numel()
    return {part: counts[part] for part in _PARTS if part in counts}


def state_bytes(config: ResolvedConfig, dp: int) -> int:
    """Estimate the bytes of weights, gradients, moments and teacher on a rank, in float32; activations come on top."""
    counts = parameter_counts(config)
    untrained = sum(counts.pop(part, 0) for part in _UNTRAINED)
    return bytes_of_state(sum(counts.values()), untrained, config.parallel, dp)


def bytes_of_state(trained: int, untrained: int, parallel: ParallelConfig, dp: int) -> int:
    """Estimate the bytes of ``trained`` parameters and of ``untrained`` ones (a teacher's, or frozen) on a rank."""
    stage = parallel.zero_on(dp)
    whole, partitioned = {0: (16, 0), 1: (8, 8), 2: (4, 12), 3: (0, 16)}[stage]
    weights_alone = 4 * untrained / (dp if stage == 3 else 1)
    return int((trained * (whole + partitioned / dp) + weights_alone) / (parallel.tp * parallel.pp))


def _tokens(config: ResolvedConfig, name: str) -> str:
    model, augment = config.model, config.data.augment
    if name == "contrastive":
        image_tokens = patches_of(model, contrastive_size(config)) + 1
        return f"{image_tokens} image + {model.text.context_length} text tokens"
    if name == "reconstruction":
        return f"{patches_of(model, model.image_size) + 1} tokens"
    return (
        f"{GLOBAL_CROPS} global crops of {patches_of(model, augment.global_size) + 1} and {augment.local_crops} local "
        f"crops of {patches_of(model, augment.local_size) + 1} tokens"
    )


def layout_summary(config: ResolvedConfig, world_size: int) -> str:
    """Return the page that ``--dry-run`` prints for a validated ``config`` on ``world_size`` processes."""
    p, model = config.parallel, config.model
    dp = world_size // (p.tp * p.pp)
    part = share(config, dp)
    counts = parameter_counts(config)
    million = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items())
    note = " (without the token embedding)" if "text" in counts and model.text.vocab_size is None else ""
    lines = [
        f"model      VTP-{model.size}, {model.image_size} px, patch {model.patch_size}, {model.bottleneck} channels",
        f"           {million}{note}",
        *layout_lines(p, world_size, state_bytes(config, dp), "teacher"),
        f"step       {config.train.batch_size} image-text pairs, {part.images} on a rank",
    ]
    for name, one in part.passes.items():
        objective = getattr(config.objectives, name)
        lines.append(
            f"  {name:<18} weight {objective.weight:g}: {one.batch} images, {on_a_rank(one)}; {_tokens(config, name)}"
        )
    adversarial = config.objectives.adversarial
    if adversarial.weight > 0:
        first, second = adversarial_starts(config)
        lines.append(
            f"  adversarial        weight {adversarial.weight:g}: on features {adversarial.features}, learns from step "
            f"{first + 1}, teaches from step {second + 1}"
        )
    samples = f"samples, seed {config.seed}"
    return "\n".join([*lines, *run_lines(config, samples, f"{config.data.root}, captions {config.data.captions}")])


def on_a_rank(part: PassShare) -> str:
    ending = "es" if part.micro_batches > 1 else ""
    return f"{part.local} on a rank in {part.micro_batches} micro-batch{ending} of {part.micro_batch}"


def layout_lines(p: ParallelConfig, world_size: int, state_bytes: int, average: str) -> list[str]:
    """Describe a layout and a rank's memory for its state, of which ``average`` is the part that follows the model."""
    stages = f" with {p.virtual_stages} stages a rank" if p.virtual_stages > 1 else ""
    pipeline = f"pipeline {p.schedule}{stages}, " if p.pp > 1 else ""
    dp = world_size // (p.tp * p.pp)
    return [
        f"layout     {world_size} process{'es' if world_size > 1 else ''} = tp {p.tp} x pp {p.pp} x dp "
        f"{dp}, {pipeline}ZeRO stage {p.zero_on(dp)}, {p.precision}, recompute {p.recompute}, "
        f"sequence parallelism {'on' if p.sequence_parallel else 'off'}, attention {p.attention}",
        f"           about {state_bytes / 2**30:.2f} GiB of weights, gradients, moments and {average} on a rank, plus "
        "activations",
    ]


def run_lines(config: Any, samples: str, data: str) -> list[str]:
    """Describe schedule, optimizer, data and output; ``samples`` and ``data`` say what is special to the recipe."""
    train, workers = config.train, config.data.workers
    return [
        f"schedule   {train.steps} steps = {train.steps * train.batch_size:,} {samples}",
        _optimizer_line(train.optimizer),
        f"data       {data}, {config.data.streams} streams, {workers} worker{'' if workers == 1 else 's'} a rank",
        f"output     {config.output_dir}, a checkpoint "
        + (f"every {train.checkpoint_every} steps and " if train.checkpoint_every else "")
        + f"at the end, the last {train.keep_last} kept",
    ]


def _optimizer_line(optimizer: OptimizerConfig) -> str:
    if optimizer.cooldown is None:
        course = f"cosine to {optimizer.min_lr:g}"
    else:
        course = f"held, in the last {optimizer.cooldown:.0%} down to {optimizer.min_lr:g}"
    return (
        f"optimizer  AdamW, lr {optimizer.lr:g} after {optimizer.warmup_steps} steps, {course}, "
        f"betas {optimizer.betas[0]:g} {optimizer.betas[1]:g}, weight decay {optimizer.weight_decay:g}, "
        f"clip {optimizer.clip_grad:g}"
    )
