"""What the readers of other projects' weights give: tensors by our names, and an account of all the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ForeignWeights:
    """Weights for some of our towers.

    Attributes:
        tensors: whole tensors by our names.
        left_out: name in the file -> why it has no place here.
        fresh: names of ours that the file cannot have; they keep their initial values.
        unknown: names in the file that this reader does not know.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """``left_out`` in words, one line per reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        return [f"left out ({reason}): {', '.join(names)}" for reason, names in by_reason.items()]


def unwrapped(state: dict, keys: tuple[str, ...] = ("state_dict", "model", "model_state_dict")) -> dict:
    """The state dict inside a training checkpoint, its keys without the ``module.`` of parallel wrappers."""
    for key in keys:
        if isinstance(state.get(key), dict):
            state = state[key]
    while state and all(isinstance(name, str) and name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state
