"""The augmentation of what a discriminator sees: what it does to a picture, and that it is the picture's own."""

import torch

from megavtp.objectives.diff_augment import augment, draw_augmentation

FULL = {"brightness": 0.5, "saturation": 1.0, "contrast": 0.5, "translation": 0.125}
OFF = dict.fromkeys(FULL, 0.0)


def pictures(count=3):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def only(index, value):
    draws = torch.zeros(1, 5)
    draws[0, index] = value
    return draws


def test_draws_are_the_pictures_own():
    whole = draw_augmentation(seed=0, step=3, pictures=range(8), tag="real")
    assert torch.equal(draw_augmentation(seed=0, step=3, pictures=range(2, 5), tag="real"), whole[2:5])
    for change in ({"seed": 1}, {"step": 4}, {"tag": "fake"}):
        other = draw_augmentation(**({"seed": 0, "step": 3, "pictures": range(8), "tag": "real"} | change))
        assert not torch.equal(other, whole)
    many = draw_augmentation(seed=0, step=0, pictures=range(2000), tag="real")
    assert many.min() > -1 and many.max() < 1 and many.mean(0).abs().max() < 0.06


def test_nothing_is_changed_without_strength_or_draw():
    x, draws = pictures(), draw_augmentation(seed=0, step=0, pictures=range(3), tag="")
    assert torch.allclose(augment(x, draws, **OFF), x, atol=1e-6)
    assert torch.allclose(augment(x, torch.zeros(3, 5), **FULL), x, atol=1e-6)
    both = augment(x, draws, **FULL)
    assert torch.allclose(augment(x[1:2], draws[1:2], **FULL), both[1:2], atol=1e-6)


def test_each_change():
    x = pictures(1)
    assert torch.allclose(augment(x, only(0, -1.0), **FULL), x - 0.5, atol=1e-6)
    grey = augment(x, only(1, -1.0), **FULL)
    assert torch.allclose(grey, x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    flat = augment(x, only(2, -1.0), **FULL)
    assert torch.allclose(flat.std(), x.std() / 2, atol=1e-6) and torch.allclose(flat.mean(), x.mean(), atol=1e-6)
    down = augment(x, only(3, 1.0), **FULL)
    assert not down[..., :2, :].any() and torch.allclose(down[..., 2:, :], x[..., :-2, :], atol=1e-6)
    left = augment(x, only(4, -0.5), **FULL)
    assert not left[..., -1].any() and torch.allclose(left[..., :-1], x[..., 1:], atol=1e-6)


def test_it_is_differentiable():
    x, draws = pictures()[..., :6, :6].double(), draw_augmentation(seed=0, step=0, pictures=range(3), tag="").double()
    assert torch.autograd.gradcheck(lambda y: augment(y, draws, **FULL), x.requires_grad_())
