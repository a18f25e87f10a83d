import pytest
import torch
import torch.nn.functional as F

from megavtp.objectives.koleo import koleo


def plain(x):
    x = F.normalize(x, dim=-1)
    total = 0
    for i in range(len(x)):
        distances = [(x[i] - x[j]).norm() for j in range(len(x)) if j != i]
        total = total - torch.stack(distances).min().log() / len(x)
    return total


def test_value_and_gradient_equal_the_plain_formula_per_crop():
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    double = x.detach().double().requires_grad_()
    expected = plain(double[0]) + plain(double[1])
    value = koleo(x)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    want, = torch.autograd.grad(expected, double)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0].double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(koleo(x[0]) + koleo(x[1]), value)


def test_neighbours_are_not_sought_in_the_other_crop():
    x = torch.randn(1, 6, 4)
    torch.testing.assert_close(koleo(x.expand(2, 6, 4)), 2 * koleo(x))


def test_one_image_gives_zero_with_zero_gradient():
    x = torch.randn(2, 1, 4, requires_grad=True)
    loss = koleo(x)
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()


def test_identical_images_are_finite_and_are_not_pushed():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    x.requires_grad_()
    loss = koleo(x)
    grad, = torch.autograd.grad(loss, x)
    assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 100
    everything_equal = torch.ones(4, 3, requires_grad=True)
    assert not torch.autograd.grad(koleo(everything_equal), everything_equal)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(dtype):
    direction, *noise = torch.randn(41, 8, generator=torch.Generator().manual_seed(0))
    x = (direction + 0.05 * torch.stack(noise)).to(dtype)  # so close that half-precision products mistake neighbours
    expected = koleo(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo(x), expected)
