"""torchvision's wheels hold kernels for CUDA, and cannot be imported beside a torch for CPUs, though the transforms and
networks need none of them. Two schemas that the kernels would define are all that the import lacks."""

import ctypes
import importlib.util
from pathlib import Path

import torch

_defined: list[torch.library.Library] = []  # a library that is not held is taken back


def define_missing() -> None:
    """Make torchvision's import work where its kernels do not load. It must be called before that import."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _defined:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            ctypes.CDLL(str(library))
            return
        except OSError:
            pass
    _defined.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _defined[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
