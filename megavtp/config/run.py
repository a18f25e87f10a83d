"""The settings that every run has, whatever it trains: layout, optimizer, steps, telemetry.

Units are in the comments; ``None`` means "derived", and the comment says from what.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megavtp.config.ranges import Above0, Count, Fraction, NotNegative, Positive, Range

Precision = Literal["fp32", "bf16", "auto"]


@dataclass(frozen=True)
class ParallelConfig:
    tp: Positive = 1  # tensor-parallel ranks
    pp: Positive = 1  # pipeline ranks; each holds a part of every tower
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = "1f1b"  # of the pipeline
    virtual_stages: Positive = 1  # parts of each tower on a pipeline rank, for interleaved_1f1b
    zero_stage: Literal[0, 1, 2, 3, "auto"] = "auto"  # auto: 1, or 0 if there is one data-parallel rank
    zero3_gather: Literal["block", "step"] = "block"  # step: all of a rank's weights stay gathered for the step
    sequence_parallel: bool = False  # the tp ranks share the tokens between a block's matrix products, too
    recompute: Literal["none", "selective", "full"] = "none"  # by the backward: the cheap activations, or each block
    # The elementwise work between a block's products through torch.compile; auto: on a GPU.
    compile: Literal["none", "blocks", "auto"] = "auto"
    # Weights, moments and teacher are always float32. With auto, the compute is bf16 where the hardware multiplies it.
    precision: Precision = "bf16"
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    # Seconds that a part of a step may take on any rank, start and saves three times that; 0 = no limit.
    timeout: Annotated[float, Range(0, 10_000_000)] = 600

    def zero_on(self, dp: int) -> int:
        """Return the ZeRO stage of a run on ``dp`` data-parallel ranks.

        A rank alone has nobody to share with, and the stages would copy its gradients and weights for nothing.
        """
        if self.zero_stage == "auto":
            return 1 if dp > 1 else 0
        return self.zero_stage


@dataclass(frozen=True)
class OptimizerConfig:
    lr: NotNegative = 1e-3  # peak
    min_lr: NotNegative = 0.0
    warmup_steps: Count = 2000
    cooldown: float | None = None  # last fraction of the steps, in which a held rate falls to min_lr; None = cosine
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Above0 = 1e-8
    weight_decay: NotNegative = 0.1  # parameters of two or more dimensions only
    clip_grad: NotNegative = 1.0  # global norm; 0 = off
    # Per tower: vision, text, decoder, dino_head, discriminator.
    lr_scale: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    steps: Positive = 67_600
    batch_size: Positive = 16_384  # samples (image-text pairs, or latents) of one step, over all ranks
    resume: Literal["auto", "never"] = "auto"
    checkpoint_every: Count = 1000  # steps; 0 = only at the end
    keep_last: Positive = 3
    max_skipped_steps: Count = 20  # non-finite steps in a row before the run stops
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class LoggingConfig:
    log_every: Positive = 20  # steps between two reads of the loss terms from the device
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "megavtp"
    tensorboard: bool = False
    peak_tflops: float | None = None  # of one device, for MFU; None = known devices' own in bf16, else no MFU


@dataclass(frozen=True)
class ReadingConfig:
    """How samples are read, whatever they are."""

    root: str
    streams: Positive = 64  # logical streams; every data-parallel size must divide it, it must divide every batch
    shuffle_block: Positive = 4096  # samples permuted together inside a stream
    workers: Count = 4  # loader processes of each rank; 0 = read in the training process
    prefetch: Positive = 2  # steps each worker prepares ahead
    max_bad_samples: Count = 1000  # in one run of one process; more is an error


@dataclass(frozen=True)
class RunConfig:
    """What the trainer reads of a configuration, whatever the recipe."""

    output_dir: str
    seed: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    telemetry: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # extra DeepSpeed keys, passed through


def has_line(config: RunConfig, done: int) -> bool:
    """Tell whether a line is written about the steps up to ``done``."""
    return done % config.telemetry.log_every == 0 or done == config.train.steps
