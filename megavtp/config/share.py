"""The share of one data-parallel rank in a step: its part of each objective's batch, and its micro-batches."""

from dataclasses import dataclass

from megavtp.config.sizes import OBJECTIVES, ResolvedConfig


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
    """A rank's share of a step: how many distinct images it loads, and the objectives that are on, in their order."""

    images: int
    passes: dict[str, PassShare]


def share(config: ResolvedConfig, dp: int) -> Share:
    """Return the share of each of ``dp`` data-parallel ranks in the steps of a validated ``config``."""

    whole, passes = config.train.batch_size, {}
    for name in OBJECTIVES:
        objective = getattr(config.objectives, name)
        batch = whole if name == "contrastive" else objective.batch
        if objective.weight != 0:
            passes[name] = PassShare(batch, batch // dp, objective.micro_batch or batch // dp)
    return Share(whole // dp, passes)
