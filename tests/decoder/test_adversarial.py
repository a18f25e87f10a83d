"""The adversarial term: its losses, its adaptive weight, the discriminator, and when they start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_run import PlainRunner, build_model, data_of, learning_rate, optimizer_of, passes_of, tiny_config
from torch.nn.utils import parametrizations

from megavtp.decoder.passes import AdversarialDecoderPass
from megavtp.models.discriminator import Discriminator, SpectralConv, first_direction, power_iteration
from megavtp.models.feature_networks import OwnFeatures, quarters
from megavtp.models.init import fill_parameters
from megavtp.objectives.adversarial import adaptive_weight, hinge, last_layer_gradient, persuasion
from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import execute
from megavtp.pixels import normalise


def second_stage(adversarial=None, steps=4, eps=1e-2, **reconstruction):
    return tiny_config({
        "model": {"init_from": "not read here"},
        "objectives": {
            "contrastive": {"weight": 0.0}, "self_distillation": {"weight": 0.0},
            "reconstruction": {"frozen_encoder": True, "l1_weight": 0.7, **reconstruction},
            "adversarial": {"weight": 0.75, "discriminator_start": 0.0, "start": 0.0, **(adversarial or {})},
        },
        "train": {"steps": steps, "optimizer": {"eps": eps}},
    })


def directions_of(module, iterations=500):
    return {
        name: power_iteration(weight, first_direction(name, weight), iterations)
        for name, weight in module.named_parameters() if name in module.normalised()
    }


def discriminator(widths):
    module = Discriminator(widths)
    from megavtp.models.init import _uniform_by_shape, constant

    rules = [(r".*norm.*weight", constant(1.0)), (r".*bias", constant(0.1)), (r".*", _uniform_by_shape())]
    fill_parameters(module.named_parameters(), rules, SINGLE, 3)
    return module


# Losses


def test_losses_of_each_picture():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, 1.0]])
    assert torch.equal(hinge(real, fake), torch.tensor([(0.25 + 0.5) / 2, (1.0 + 2.0) / 2]))
    assert torch.equal(persuasion(fake), torch.tensor([1.5, -1.0]))


def test_the_adaptive_weight_is_autograds():
    """Of the weight gradients at the decoder's last layer, by a backward through a real decoder for each loss."""
    config = second_stage()
    model = build_model(config, SINGLE)
    batch = data_of(config, SINGLE)(0)
    (decoder, _), runner = passes_of(config, SINGLE), PlainRunner(model, None, 0.0)
    terms = execute(decoder, runner, batch)

    images = normalise(batch.images[batch.rec_rows])
    with torch.no_grad():
        latents = model("encode", images=images)
    last = model.pixel_decoder.proj_out.weight
    decoded = model("trained_decode", latents=latents, noise=decoder.noise(0))
    rec = decoder.settings.l1_weight * reconstruction_terms(decoded, images, images_total_local=len(images))["l1"]
    gan = decoder._adversarial(decoded, 0)
    rec_gradient, gan_gradient = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (rec, gan))
    expected = rec_gradient.norm() / (gan_gradient.norm() + 1e-6)
    assert float(terms["reconstruction/adaptive_weight"]) == pytest.approx(float(expected), rel=1e-6)

    # And the decoder's whole gradient is that of the weighted sum.
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss = decoder.weight * (rec + decoder.adversary.settings.weight * expected * gan)
    names = list(found)
    assert names and all(name.startswith("pixel_decoder.") for name in names)
    whole = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    for name, gradient in zip(names, whole):
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name


def test_the_last_layers_gradient():
    layer = torch.nn.Conv2d(6, 3 * 4, 1)
    x = torch.randn(2, 6, 5, 5)
    images = F.pixel_shuffle(layer(x), 2)
    (images**2).sum().backward()
    found = last_layer_gradient(2 * images.detach(), x, patch=2)
    assert torch.allclose(found, layer.weight.grad.flatten(1), rtol=1e-5, atol=1e-5)


def test_the_adaptive_weight_is_bounded():
    large, nothing = torch.full((3, 4), 1e6), torch.zeros(3, 4)
    assert adaptive_weight(large, nothing, SINGLE) == 1e4
    assert adaptive_weight(nothing, large, SINGLE) == 0


# Discriminator


@pytest.mark.parametrize("shape", [(5, 8, 1), (4, 3, 9), (6, 3, 4, 4)])
def test_spectral_normalisation_is_torchs(shape):
    torch.manual_seed(0)  # with two largest singular values nearly alike neither of the two would have settled
    outputs, inputs, *kernel = shape
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[len(kernel)]
    theirs = parametrizations.spectral_norm(kind(inputs, outputs, tuple(kernel)), n_power_iterations=500)
    ours = SpectralConv(inputs, outputs, *kernel)
    weight = theirs.parametrizations.weight.original
    with torch.no_grad():
        ours.weight.copy_(weight)
        ours.bias.copy_(theirs.bias)
    direction = power_iteration(ours.weight, first_direction("x", ours.weight), 500)
    x = torch.randn(2, inputs, *(12 for _ in kernel))
    y = ours(x, direction)
    assert torch.allclose(y, theirs(x), atol=1e-5)
    largest = torch.linalg.matrix_norm(ours.weight.flatten(1), 2)
    assert torch.allclose(y, ours.convolve(x, ours.weight / largest, ours.bias), atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), [ours.weight])
    (expected,) = torch.autograd.grad(theirs(x).sum(), [weight])
    assert torch.allclose(gradient, expected, atol=1e-4)


def test_a_picture_has_its_own_answers():
    module = discriminator([16, 16, None])
    features = [torch.randn(5, 9, 16), torch.randn(5, 9, 16), torch.rand(5, 3, 32, 32)]
    directions, anchor = directions_of(module), torch.zeros(())
    answers = module(anchor, features, directions)
    assert answers.shape == (5, 9 + 9 + 9) and answers.dtype == torch.float32
    assert torch.allclose(module(anchor, [x[2:4] for x in features], directions), answers[2:4], atol=1e-5)
    # Tokens are a ring: moving all of them moves the answers.
    rolled = module(anchor, [features[0].roll(3, 1), *features[1:]], directions)
    assert torch.allclose(rolled[:, :9], answers[:, :9].roll(3, 1), atol=1e-5)


def test_without_features_every_parameter_has_a_gradient_of_zero():
    module = discriminator([8])
    zero, *copies = module(torch.zeros((), requires_grad=True))
    zero.backward()
    assert zero == 0 and all(not p.grad.any() for p in module.parameters())
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(copies, module.parameters(), strict=True))


def test_own_features_are_the_encoders():
    assert quarters(12) == [2, 5, 8, 11] and quarters(24) == [5, 11, 17, 23] and quarters(2) == [0, 1]
    config = second_stage()
    model = build_model(config, SINGLE)
    features = OwnFeatures(config.model, None, torch.float32)
    features.load(dict(model.trunk.named_parameters()), torch.device("cpu"))
    uint8 = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pictures = (uint8 / 127.5 - 1).requires_grad_()
    found = features(pictures)
    images, taps = normalise(uint8), quarters(config.model.vision.depth)
    inner = model.trunk([images], layers=taps, normalise=False)
    for x, (expected,) in zip(found, inner):
        assert torch.allclose(x, expected[:, 1:], atol=1e-4)
    assert torch.allclose(found[-1], model("features", images=images)[1], atol=1e-4)
    assert [x.shape[-1] for x in found] == list(features.widths)
    found[-1].sum().backward()
    assert pictures.grad.any() and all(p.grad is None for p in features.parameters())
    without = {name: p for name, p in model.trunk.named_parameters() if name != "mask_token"}
    features.load(without, torch.device("cpu"))  # foreign weights may lack it, and no picture here is masked
    assert all(torch.equal(x, y) for x, y in zip(features(pictures), found, strict=True))


# Starts


def train(config, steps):
    """The reference's steps: terms of each, and the final weights."""
    model = build_model(config, SINGLE)
    runner = PlainRunner(model, optimizer_of(model, config), config.train.optimizer.clip_grad)
    data, passes, terms = data_of(config, SINGLE), passes_of(config, SINGLE), []
    for step in range(steps):
        runner.set_lr(learning_rate(config, step))
        runner.begin_step()
        found = {}
        for objective in passes:
            found |= execute(objective, runner, data(step))
        runner.step()
        terms.append(found)
    return terms, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_discriminator_that_has_not_started_changes_nothing():
    without = second_stage({"weight": 0.0})
    plain, expected = train(without, 3)
    terms, weights = train(second_stage({"discriminator_start": 0.75, "start": 0.75}), 3)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    for step, found in zip(plain, terms):
        assert all(torch.equal(found[name], value) for name, value in step.items())
    assert len(plain[0]) < len(terms[0]), "the terms that are still zero have their names from the start"
    # It has not moved either, whatever the optimizer would do to it.
    start = build_model(second_stage(), SINGLE)
    heads = [name for name, _ in start.named_parameters() if name.startswith("discriminator.")]
    assert heads and all(torch.equal(weights[name], start.get_parameter(name)) for name in heads)


def test_the_discriminator_learns_before_it_teaches():
    early = second_stage({"discriminator_start": 0.25, "start": 0.5})
    terms, _ = train(early, 4)
    assert [float(t["discriminator/hinge"]) > 0 for t in terms] == [False, True, True, True]
    assert [float(t["reconstruction/adaptive_weight"]) > 0 for t in terms] == [False, False, True, True]
    alone, _ = train(second_stage({"features": "pixels", "start": 1.0}, steps=20, eps=1e-8), 20)
    gaps = [float(t["discriminator/real"] - t["discriminator/fake"]) for t in alone]
    assert sum(gaps[-5:]) > sum(gaps[:5]) + 1, gaps


def test_a_fixed_weight_is_the_same_term_without_the_balance():
    config = second_stage({"adaptive": False})
    model, (decoder, _) = build_model(config, SINGLE), passes_of(config, SINGLE)
    terms = execute(decoder, PlainRunner(model, None, 0.0), data_of(config, SINGLE)(0))
    assert isinstance(decoder, AdversarialDecoderPass) and terms["reconstruction/adaptive_weight"] == 1
    plain = second_stage({"weight": 0.0})
    without = build_model(plain, SINGLE)
    execute(passes_of(plain, SINGLE)[0], PlainRunner(without, None, 0.0), data_of(plain, SINGLE)(0))
    name = "pixel_decoder.proj_out.weight"
    assert not torch.allclose(model.get_parameter(name).grad, without.get_parameter(name).grad)


def test_features_of_pixels():
    terms, weights = train(second_stage({"features": "pixels"}, steps=2), 2)
    assert any(name.startswith("discriminator.heads.0.down.") for name in weights)
    assert all(torch.isfinite(value).all() for step in terms for value in step.values())


def test_what_is_looked_at_is_decoded_by_the_average():
    config = second_stage(decoder_momentum=0.5)
    model, images = build_model(config, SINGLE), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.start_averages()
        model.averaged_decoder.proj_out.bias.add_(1)
        latents = model("encode", images=images)
        averaged, trained = model("decode", latents=latents), model("trained_decode", latents=latents)
    assert torch.allclose(averaged, trained + 1, atol=1e-5)
    assert torch.equal(model("reconstruction", images=images), averaged)
