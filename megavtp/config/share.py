"""What one data-parallel rank does of a step: its part of each objective's batch, and in how many micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from megavtp.config.sizes import ResolvedConfig


@dataclass(frozen=True)
class PassShare:
    """One objective's batch: ``batch`` images of the step, ``local`` of them on this rank, in equal micro-batches."""

    batch: int
    local: int
    micro_batch: int

    @property
    def micro_batches(self) -> int:
        return self.local // self.micro_batch


@dataclass(frozen=True)
class Share:
    """``images``: distinct images a rank loads per step. A pass is None where its objective is off."""

    dp: int
    images: int
    contrastive: PassShare | None
    self_distillation: PassShare | None
    reconstruction: PassShare | None

    @property
    def passes(self) -> dict[str, PassShare]:
        """The objectives that are on, in the order in which a step runs them."""
        named = {name: getattr(self, name) for name in ("contrastive", "self_distillation", "reconstruction")}
        return {name: part for name, part in named.items() if part is not None}


def share(config: ResolvedConfig, dp: int) -> Share:
    """The share of a rank in a validated ``config`` on ``dp`` data-parallel ranks."""

    def part(objective, batch: int) -> PassShare | None:
        if objective.weight == 0:
            return None
        return PassShare(batch, batch // dp, objective.micro_batch or batch // dp)

    objectives = config.objectives
    return Share(
        dp=dp,
        images=config.train.batch_size // dp,
        contrastive=part(objectives.contrastive, config.train.batch_size),
        self_distillation=part(objectives.self_distillation, objectives.self_distillation.batch),
        reconstruction=part(objectives.reconstruction, objectives.reconstruction.batch),
    )
