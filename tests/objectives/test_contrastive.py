import math

import pytest
import torch
import torch.nn.functional as F

from megavtp.objectives.contrastive import info_nce, siglip


def pairs(b=5, e=7):
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(b, e, generator=g), dim=-1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(12.5, requires_grad=True), torch.tensor(-3.0, requires_grad=True)


def plain_info_nce(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    b = len(logits)
    by_row = sum(logits[i].exp().sum().log() - logits[i, i] for i in range(b)) / b
    by_column = sum(logits[:, i].exp().sum().log() - logits[i, i] for i in range(b)) / b
    return (by_row + by_column) / 2


def plain_siglip(image, text, scale, bias):
    total = 0
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1 if i == j else -1
            total = total + (1 + (-z * (scale * image[i] @ text[j] + bias)).exp()).log()
    return total / len(image)


@pytest.mark.parametrize("loss,plain", [(info_nce, plain_info_nce), (siglip, plain_siglip)])
def test_value_and_gradient_equal_the_plain_formula(loss, plain):
    inputs = pairs()
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    value, expected = loss(*inputs), plain(*doubles)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, doubles)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_info_nce_gives_the_bias_exactly_no_gradient():
    image, text, scale, bias = pairs()
    loss = info_nce(image, text, scale, bias)
    assert torch.equal(loss, info_nce(image, text, scale))
    assert torch.autograd.grad(loss, bias)[0].item() == 0.0


@pytest.mark.parametrize("loss", [info_nce, siglip])
def test_extreme_scale_and_bias_stay_finite(loss):
    image, text, _, _ = pairs()
    inputs = image, text.roll(1, 0).detach().requires_grad_(), torch.tensor(1e4), torch.tensor(-50.0)
    value = loss(*inputs)
    assert all(x.isfinite().all() for x in (value, *torch.autograd.grad(value, inputs[:2])))


def test_one_pair():
    image, text, scale, bias = pairs(b=1)
    loss = info_nce(image, text, scale)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (image, text, scale)))
    expected = math.log1p(math.exp(-(12.5 * (image * text).sum().item() - 3)))
    assert siglip(image, text, scale, bias).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [info_nce, siglip])
def test_computes_in_float32_whatever_surrounds_it(loss):
    image, text, scale, bias = pairs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(image, text, scale, bias), loss(image.float(), text, scale, bias))
        half = loss(image.bfloat16(), text.bfloat16(), scale.bfloat16(), bias)
    exact = loss(image.bfloat16().float(), text.bfloat16().float(), scale.bfloat16().float(), bias)
    assert half.dtype == torch.float32 and torch.equal(half, exact)
