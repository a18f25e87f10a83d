"""What a comparison consists of, and how large it is on which machine."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import Way, difference
from megavtp.config.run import OptimizerConfig
from megavtp.nn.precision import computing_in
from megavtp.training.optimizer import parameter_groups

LR = 1e-4
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Both sides compute in bf16 with weights in float32 on a GPU, and in float32 on a CPU."""

    device: torch.device
    tiny: bool = False

    def size(self, tiny: T, cpu: T, gpu: T) -> T:
        return tiny if self.tiny else gpu if self.device.type == "cuda" else cpu

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """For the rival: MegaVTP's models enter it themselves."""
        return computing_in(self.dtype, self.device)


class Pair(NamedTuple):
    """The same work by both.

    Attributes:
        work: what they do, with its sizes.
        difference: of their results, relative; None where the weights of one cannot be the other's.
        counts_memory: whether torch allocates what they need.
    """

    work: str
    ours: Way
    theirs: Way
    difference: float | None
    counts_memory: bool = True


@dataclass(frozen=True)
class Comparison:
    """``open(setting)`` gives the pair and takes it down again. ImportError says that the rival is not there.

    Attributes:
        rival: as pip calls it, or the repository on GitHub of one that is no package.
    """

    what: str
    rival: str
    open: Callable[[Setting], AbstractContextManager[Pair]]

    @property
    def packaged(self) -> bool:
        return "/" not in self.rival

    @property
    def source(self) -> str:
        """The rival with its version, where it has one."""
        return f"{self.rival} {version(self.rival)}" if self.packaged else self.rival

    @property
    def remedy(self) -> str:
        """Say how to get the rival."""
        if self.packaged:
            return f"pip install -c constraints.txt {self.rival}"
        return f"git clone https://github.com/{self.rival}, install what it needs, and name it in PYTHONPATH"

    def start(self, setting: Setting) -> AbstractContextManager[Pair]:
        """Open the pair with weights and inputs that are always the same."""
        torch.manual_seed(0)
        return self.open(setting)


def fused_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return what updates a rival's model: torch's fused AdamW, with the groups and settings that MegaVTP's has."""
    groups = parameter_groups(model.named_parameters(), config)
    return torch.optim.AdamW(groups, lr=LR, betas=config.betas, eps=config.eps, fused=True)


def step_of(
    model: nn.Module, loss_of: Callable[[], Tensor], config: OptimizerConfig, after: Callable[[], object] | None = None
) -> Callable[[], Tensor]:
    """Return a rival's step: loss, backward, clipping, update as ``fused_adamw`` says, and what comes ``after`` it."""
    optimizer = fused_adamw(model, config)
    parameters = list(model.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        optimizer.step()
        if after is not None:
            after()
        return loss

    return step


def steps_differ(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float:
    """Do two steps of both and return by how much the losses differ.

    The second loss shows whether the first step's gradients and updates agree.
    """
    losses = [torch.stack([step().detach() for _ in range(2)]) for step in (ours, theirs)]
    return difference(losses[:1], losses[1:])
