"""Readers of other projects' weights return these: tensors by our names, and an account of all the rest."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ForeignWeights:
    """Weights for some of our towers.

    Attributes:
        tensors: whole tensors by our names.
        left_out: maps a name in the file to the reason why it is not used.
        fresh: our names of tensors that such a file cannot have; they keep their initial values.
        unknown: names in the file that this reader does not know.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Describe ``left_out`` in one line per reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        return [f"left out ({reason}): {', '.join(names)}" for reason, names in by_reason.items()]


def unwrapped(state: dict) -> dict:
    """Return the state dict inside a training checkpoint, without the ``module.`` that wrappers put before its keys."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
    while state and all(isinstance(name, str) and name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state
