"""Noise on the way to the decoder: which draws it is made of, how strong it is, and whom it teaches."""

from dataclasses import replace

import pytest
import torch
from vtp_oracle import TINY

from megavtp.models.build import build_vtp
from megavtp.models.latent_noise import LatentNoise, draw_latent_noise

SHAPE = (6, 5, 5)


def draw(images, **changes):
    settings = {"seed": 0, "step": 3, "images": images, "shape": SHAPE, "strength": 0.5, "share": 0.5}
    return draw_latent_noise(**(settings | changes))


def test_an_image_has_its_own_draw():
    whole, part = draw(range(8)), draw(range(5, 7))
    assert torch.equal(part.unit, whole.unit[5:7]) and torch.equal(part.strength, whole.strength[5:7])
    for change in ({"step": 4}, {"seed": 1}):
        assert not torch.equal(draw(range(8), **change).unit, whole.unit)


def test_shares_and_strengths():
    strength = draw(range(1000), shape=(1, 1, 1)).strength.flatten()
    noisy = strength[strength > 0]
    assert len(noisy) == pytest.approx(500, abs=60)  # four standard deviations
    assert noisy.max() <= 0.5 and noisy.mean() == pytest.approx(0.25, abs=0.03)
    assert not draw(range(50), share=0.0).strength.any() and draw(range(50), share=1.0).strength.all()


def test_noise_is_measured_in_the_channels_deviations():
    latents = 4 + torch.randn(2, 3, 40, 40) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    noise = LatentNoise(torch.randn(2, 3, 40, 40), torch.tensor([0.0, 0.3]).view(2, 1, 1, 1))
    added = noise.add(latents) - latents
    assert not added[0].any()
    assert torch.allclose(added[1].std((1, 2)) / latents[1].std((1, 2)), torch.tensor(0.3), rtol=0.05)


def test_noisy_images_teach_the_decoder_alone():
    config = replace(TINY, rope_dtype="float32")
    model = build_vtp(config, seed=1)
    images = torch.randn(2, 3, config.image_size, config.image_size)
    side = config.image_size // config.patch_size
    shape = (config.bottleneck, side, side)

    def gradients(strengths):
        model.zero_grad()
        noise = LatentNoise(torch.randn(2, *shape), torch.tensor(strengths).view(2, 1, 1, 1))
        model("reconstruction", images=images, noise=noise).square().mean().backward()
        return model.trunk.patch_embed.proj.weight.grad, model.pixel_decoder.proj_in.weight.grad

    encoder, decoder = gradients([0.2, 0.2])
    assert (encoder is None or not encoder.any()) and decoder.any()
    encoder, _ = gradients([0.2, 0.0])
    assert encoder.any()
