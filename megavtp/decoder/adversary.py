"""What the two passes of the second stage share on the last pipeline rank: the discriminator as it stands in a step."""

import torch
from torch import Tensor
from torch.func import functional_call

from megavtp.config.precision import compute_dtype
from megavtp.config.sizes import ResolvedConfig, adversarial_starts
from megavtp.models.discriminator import Discriminator, first_direction, power_iteration
from megavtp.models.feature_networks import FeatureNetwork
from megavtp.nn.precision import computing_in
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.pipeline import Runner

_FIRST_ITERATIONS = 15  # of the power iteration, before the discriminator's first step; later one a step is enough


class Adversary:
    """The discriminator, its features and the decoded pictures of one step.

    The decoder learns from a copy of this step's weights that autograd treats as constants: its gradient then goes to
    the pictures alone, and no hook of a sharding engine sees it.

    Attributes:
        left: each convolution's left singular vector by the name of its weight, carried from step to step.
        fakes: the decoded pictures of each micro-batch as uint8, for the discriminator's pass.
    """

    def __init__(self, config: ResolvedConfig, features: FeatureNetwork, mesh: Mesh, device: torch.device):
        self.settings, self.features = config.objectives.adversarial, features
        self.mesh, self.device = mesh, device
        self.dtype = compute_dtype(config.parallel.precision)
        with torch.device("meta"):
            self._shape = Discriminator(features.widths)
        self.discriminator_starts, self.starts = adversarial_starts(config)
        shapes = dict(self._shape.named_parameters())
        self.left = {name: first_direction(name, shapes[name]).to(device) for name in self._shape.normalised()}
        self.fakes: dict[int, Tensor] = {}
        self._zero = torch.zeros((), device=device)

    def begin(self, run: Runner, step: int) -> None:
        """Take this step's weights and singular vectors, once the discriminator has started."""
        self.step = step
        self.fakes = {}
        if not self.learns or not self.mesh.is_last_stage:
            return
        with torch.no_grad():
            _, *weights = run("discriminate")
        self.weights = dict(zip((name for name, _ in self._shape.named_parameters()), weights, strict=True))
        iterations = _FIRST_ITERATIONS if step == self.discriminator_starts else 1
        self.directions = {
            name: power_iteration(self.weights[name], left, iterations) for name, left in self.left.items()
        }
        self.left = {name: left for name, (left, _) in self.directions.items()}

    @property
    def learns(self) -> bool:
        """Whether the discriminator learns in this step."""
        return self.step >= self.discriminator_starts

    @property
    def teaches(self) -> bool:
        """Whether the decoder learns from it in this step."""
        return self.step >= self.starts

    def answers(self, pictures: Tensor) -> Tensor:
        """Return the discriminator's answers (b, M) with this step's weights; only ``pictures`` get a gradient."""
        with computing_in(self.dtype, self.device):
            return functional_call(self._shape, self.weights, (self._zero, self.features(pictures), self.directions))
