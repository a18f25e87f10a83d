"""The settings that every run has, whatever it trains: layout, optimizer, steps, telemetry.

Units are in the comments; ``None`` means "derived", and the comment says from what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class ParallelConfig:
    tp: int = 1  # tensor-parallel ranks
    pp: int = 1  # pipeline ranks; each holds a part of every tower
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = "1f1b"  # of the pipeline
    virtual_stages: int = 1  # parts of each tower on a pipeline rank, for interleaved_1f1b
    zero_stage: Literal[0, 1, 2, 3] = 1
    zero3_gather: Literal["block", "step"] = "block"  # step: all of a rank's weights stay gathered for the step
    sequence_parallel: bool = False  # the tp ranks share the tokens between a block's matrix products, too
    recompute: Literal["none", "selective", "full"] = "none"  # by the backward: the cheap activations, or each block
    # Weights, moments and teacher are always float32. With auto, the compute is bf16 where the hardware multiplies it.
    precision: Literal["fp32", "bf16", "auto"] = "bf16"
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    timeout: float = 600  # s that a part of a step may take on any rank, start and saves three times that; 0 = no limit


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-3  # peak
    min_lr: float = 0.0
    warmup_steps: int = 2000
    cooldown: float | None = None  # last fraction of the steps, in which a held rate falls to min_lr; None = cosine
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # parameters of two or more dimensions only
    clip_grad: float = 1.0  # global norm; 0 = off
    # Per tower: vision, text, decoder, dino_head, discriminator.
    lr_scale: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 67_600
    batch_size: int = 16_384  # image-text pairs of one step, over all ranks
    resume: Literal["auto", "never"] = "auto"
    checkpoint_every: int = 1000  # steps; 0 = only at the end
    keep_last: int = 3
    max_skipped_steps: int = 20  # non-finite steps in a row before the run stops
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class LoggingConfig:
    log_every: int = 20  # steps between two reads of the loss terms from the device
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "megavtp"
    tensorboard: bool = False
    peak_tflops: float | None = None  # of one device, for MFU; None = known devices' own in bf16, else no MFU


class ReadingConfig(Protocol):
    """How a loader reads, whatever the data are."""

    @property
    def workers(self) -> int: ...

    @property
    def prefetch(self) -> int: ...

    @property
    def max_bad_samples(self) -> int: ...


class RunConfig(Protocol):
    """What the trainer reads of a configuration, whatever the recipe."""

    @property
    def seed(self) -> int: ...

    @property
    def output_dir(self) -> str: ...

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def telemetry(self) -> LoggingConfig: ...

    @property
    def deepspeed(self) -> dict[str, Any]: ...
