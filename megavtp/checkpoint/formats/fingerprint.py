"""A tokenizer is identified by a hash of everything that decides the latents of an image."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from megavtp.config.sizes import ResolvedModel

# Encoding does not read the mask token, and the periods follow from the config.
NOT_READ = {"trunk.mask_token", "trunk.rope_embed.periods"}


def encoder_fingerprint(config: ResolvedModel, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the encoder's weights in float32 and of the settings that their shapes do not show.

    ``tensors`` are whole and go by our names; those of other towers are ignored. A run's checkpoint and the released
    folder made from it have the same fingerprint.
    """
    vision = config.vision
    settings = {"heads": vision.heads, "norm": vision.norm, "ffn": vision.ffn, "rope_dtype": config.rope_dtype}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(name for name in tensors if name.startswith("trunk.") and name not in NOT_READ):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
