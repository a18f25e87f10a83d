"""What a run would be, in a page of text: sizes, batches, layout, schedule. Arithmetic only; nothing is built."""

from __future__ import annotations

from typing import Any

from megavtp.config.run import OptimizerConfig, ParallelConfig
from megavtp.config.share import share
from megavtp.config.sizes import (
    DECODER_MLP_RATIO,
    GLOBAL_CROPS,
    ResolvedConfig,
    ResolvedModel,
    contrastive_size,
    feature_width,
    ffn_hidden,
)


def _transformer(tower: Any, ffn: str, ratio: float, norm_has_bias: bool) -> int:
    """Parameters of ``tower.depth`` blocks and the final norm."""
    width, norm = tower.width, tower.width * (2 if norm_has_bias else 1)
    hidden = ffn_hidden(ffn, width, ratio)
    attention = 4 * width * width + 4 * width
    if getattr(tower, "qk_norm", False):
        attention += 2 * width // tower.heads
    feed_forward = 2 * width * hidden + hidden + width
    if ffn != "mlp":
        feed_forward += width * hidden + hidden
    scales = 2 * width if tower.layer_scale is not None else 0
    return tower.depth * (attention + feed_forward + 2 * norm + scales) + norm


def _vision(model: ResolvedModel) -> int:
    width, tower = model.vision.width, model.vision
    blocks = _transformer(tower, tower.ffn, tower.mlp_ratio, tower.norm != "rmsnorm")
    tokens = 2 * width  # class and mask token
    patches = 3 * model.patch_size**2 * width + width
    return blocks + tokens + patches + (width * model.bottleneck if model.bottleneck != width else 0)


def _text(model: ResolvedModel) -> int:
    """The text tower, both projections into the shared space and the temperature."""
    text = model.text
    embeddings = ((text.vocab_size or 0) + text.context_length) * text.width
    projections = feature_width(model) * text.width
    if text.projection == "linear":
        projections += text.width**2 + (text.width if text.projection_bias else 0)
    scalars = 1 if model.init_logit_bias is None else 2
    return _transformer(text, "mlp", text.mlp_ratio, True) + embeddings + projections + scalars


def _decoder(model: ResolvedModel) -> int:
    tower, pixels = model.decoder, 3 * model.patch_size**2
    blocks = _transformer(tower, tower.ffn, DECODER_MLP_RATIO, tower.norm != "rmsnorm")
    return blocks + (model.bottleneck + 1) * tower.width + (tower.width + 1) * pixels


def _dino_head(model: ResolvedModel) -> int:
    head = model.dino_head
    widths = [feature_width(model), *[head.hidden] * (head.layers - 1), head.bottleneck]
    layers = sum(a * b + b for a, b in zip(widths, widths[1:]))
    return layers + head.prototypes * (head.bottleneck + 1)


def parameter_counts(config: ResolvedConfig) -> dict[str, int]:
    """Parameters of each tower that a validated ``config`` trains, of the EMA teacher, and of a frozen encoder.

    A vocabulary that the tokenizer decides counts as empty.
    """
    model, o = config.model, config.objectives
    trunk = _vision(model)
    counts = {"frozen_encoder" if o.reconstruction.frozen_encoder else "vision": trunk}
    if o.reconstruction.weight == 0 and model.bottleneck_reconstruction_only and model.bottleneck != model.vision.width:
        counts["vision"] -= model.vision.width * model.bottleneck  # nothing reads the bottleneck: it stays frozen
    if o.contrastive.weight > 0:
        counts["text"] = _text(model)
    if o.reconstruction.weight > 0:
        counts["decoder"] = _decoder(model)
    if o.self_distillation.weight > 0:
        counts["dino_head"] = _dino_head(model)
        counts["teacher"] = trunk + counts["dino_head"]
    return counts


def state_bytes(config: ResolvedConfig, dp: int) -> int:
    """About how many bytes of weights, gradients, moments and teacher a rank holds; activations come on top.

    Float32 throughout. ZeRO 1 and 2 keep a second, partitioned copy of the weights.
    """
    counts = parameter_counts(config)
    untrained = counts.pop("teacher", 0) + counts.pop("frozen_encoder", 0)
    return bytes_of_state(sum(counts.values()), untrained, config.parallel, dp)


def bytes_of_state(trained: int, untrained: int, parallel: ParallelConfig, dp: int) -> int:
    """The same for ``trained`` parameters and ``untrained`` ones, which follow them or stand still."""
    whole, partitioned = {0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 16)}[parallel.zero_stage]
    weights_alone = 4 * untrained / (dp if parallel.zero_stage == 3 else 1)
    return int((trained * (whole + partitioned / dp) + weights_alone) / (parallel.tp * parallel.pp))


def _tokens(config: ResolvedConfig, name: str) -> str:
    model, augment = config.model, config.data.augment
    size = contrastive_size(config) if name == "contrastive" else model.image_size
    per_image = (size // model.patch_size) ** 2 + 1
    if name == "contrastive":
        return f"{per_image} image + {model.text.context_length} text tokens"
    if name == "reconstruction":
        return f"{per_image} tokens"
    crops = (augment.global_size, augment.local_size)
    global_tokens, local_tokens = ((size // model.patch_size) ** 2 + 1 for size in crops)
    return (
        f"{GLOBAL_CROPS} global crops of {global_tokens} and {augment.local_crops} local crops of {local_tokens} tokens"
    )


def layout_summary(config: ResolvedConfig, world_size: int) -> str:
    """The page that ``--dry-run`` prints for a validated ``config`` on ``world_size`` processes."""
    p, train, data, model = config.parallel, config.train, config.data, config.model
    dp = world_size // (p.tp * p.pp)
    part = share(config, dp)
    counts = parameter_counts(config)
    million = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items())
    note = " (without the token embedding)" if "text" in counts and model.text.vocab_size is None else ""
    stages = f" with {p.virtual_stages} stages a rank" if p.virtual_stages > 1 else ""
    pipeline = f"pipeline {p.schedule}{stages}, " if p.pp > 1 else ""
    lines = [
        f"model      VTP-{model.size}, {model.image_size} px, patch {model.patch_size}, {model.bottleneck} channels",
        f"           {million}{note}",
        f"layout     {world_size} process{'es' if world_size > 1 else ''} = tp {p.tp} x pp {p.pp} x dp {dp}, "
        f"{pipeline}ZeRO stage {p.zero_stage}, {p.precision}, recompute {p.recompute}, "
        f"sequence parallelism {'on' if p.sequence_parallel else 'off'}, attention {p.attention}",
        f"           about {state_bytes(config, dp) / 2**30:.2f} GiB of weights, gradients, moments and teacher on a "
        "rank, plus activations",
        f"step       {train.batch_size} image-text pairs, {part.images} on a rank",
    ]
    for name, one in part.passes.items():
        objective = getattr(config.objectives, name)
        lines.append(
            f"  {name:<18} weight {objective.weight:g}: {one.batch} images, {one.local} on a rank in "
            f"{one.micro_batches} micro-batch{'es' if one.micro_batches > 1 else ''} of {one.micro_batch}; "
            f"{_tokens(config, name)}"
        )
    lines += [
        f"schedule   {train.steps} steps = {train.steps * train.batch_size:,} samples, seed {config.seed}",
        optimizer_line(train.optimizer),
        f"data       {data.root}, captions {data.captions}, {data.streams} streams, "
        f"{data.workers} worker{'' if data.workers == 1 else 's'} a rank",
        f"output     {config.output_dir}, a checkpoint "
        + (f"every {train.checkpoint_every} steps and " if train.checkpoint_every else "")
        + f"at the end, the last {train.keep_last} kept",
    ]
    return "\n".join(lines)


def optimizer_line(optimizer: OptimizerConfig) -> str:
    """The optimizer and its learning rate over a run, in a line."""
    if optimizer.cooldown is None:
        course = f"cosine to {optimizer.min_lr:g}"
    else:
        course = f"held, in the last {optimizer.cooldown:.0%} down to {optimizer.min_lr:g}"
    return (
        f"optimizer  AdamW, lr {optimizer.lr:g} after {optimizer.warmup_steps} steps, {course}, "
        f"betas {optimizer.betas[0]:g} {optimizer.betas[1]:g}, weight decay {optimizer.weight_decay:g}, "
        f"clip {optimizer.clip_grad:g}"
    )
