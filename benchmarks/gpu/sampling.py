"""Drawing images with a DiT and a tokenizer's decoder of random weights, through the sampler of the tools."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import attempt
from benchmarks.gpu.parts import SAMPLING_CASES
from benchmarks.gpu.steps import dit_config, forget, vtp_config
from benchmarks.step import drawn_on, timed
from megavtp.checkpoint.formats.vtp_source import VTPSource
from megavtp.dit.checkpoint import StoredDiT
from megavtp.dit.model.build import build_dit
from megavtp.dit.sampling.sampler import Sampler
from megavtp.dit.sampling.samples import each
from megavtp.dit.sampling.settings import SamplingSettings
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact
from megavtp.models.build import build_vtp
from megavtp.tokenizer import Tokenizer


def measure_sampling(_: str, rehearse: bool) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    vtp = vtp_config("l", ["model.bottleneck=8"] if rehearse else [], rehearse)
    config = dit_config([], rehearse)
    model, count = vtp.model, config.model.latent_channels
    artifact = TokenizerArtifact(
        "random weights", model.image_size, model.patch_size, count,
        statistics=LatentStatistics((0.0,) * count, (1.0,) * count),
    )
    with drawn_on(device):
        tensors = build_vtp(model, objectives=frozenset({"reconstruction"}), device=device).state_dict()
        generator = build_dit(config.model, device=device).eval()
    source = VTPSource(Path("random weights"), vtp, tensors, artifact, captions=None)
    tokenizer = Tokenizer(source, device, torch.bfloat16)
    dit = StoredDiT(config, 0, artifact, model=generator)
    samples = each([0, 1], 1) if rehearse else each(range(64), 1)
    steps = 2 if rehearse else 50

    def draw(guidance: float) -> dict[str, Any]:
        settings = SamplingSettings(steps=steps, guidance=guidance)
        sampler = Sampler(dit, "random weights", tokenizer, settings, torch.bfloat16)
        seconds = timed(lambda: sampler.images(samples), device, 1, untimed=1)
        return {"images_per_second": len(samples) / seconds, "steps": steps, "seconds": seconds}

    for name, guidance in SAMPLING_CASES.items():
        forget(device)
        attempt(name, lambda guidance=guidance: draw(guidance))
