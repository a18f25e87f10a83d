"""The share of one data-parallel rank in a step: its part of each objective's batch, and its micro-batches."""

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

    def rows(self, micro: int) -> slice:
        """Return the rows of this rank's share that are in a micro-batch."""
        return slice(micro * self.micro_batch, (micro + 1) * self.micro_batch)


@dataclass(frozen=True)
class Share:
    """A rank's share of a step. It loads ``images`` distinct images; a pass is None where its objective is off."""

    dp: int
    images: int
    contrastive: PassShare | None
    self_distillation: PassShare | None
    reconstruction: PassShare | None

    @property
    def passes(self) -> dict[str, PassShare]:
        """Return the objectives that are on, in the order in which a step runs them."""
        named = {name: getattr(self, name) for name in ("contrastive", "self_distillation", "reconstruction")}
        return {name: part for name, part in named.items() if part is not None}


def share(config: ResolvedConfig, dp: int) -> Share:
    """Return the share of each of ``dp`` data-parallel ranks in the steps of a validated ``config``."""

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
